"""Every real architecture at true size, without weights: our networks of the shipped configs have exactly the tensors
of the authors' own code (lists/, made by make_lists.py), and the cards tell their sizes truly."""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path

import pytest
import torch
from torch import nn

from app.cards.cards import read_cards
from app.cards.files import INDEX
from app.cards.folder import ModelFolder
from app.errors import CheckpointError
from app.families.authors import from_original
from app.families.components import blank_network, has_weights, outline_of
from app.families.text import clip_keys
from tests.seeds.make_lists import Shapes, folded, read_lists, unfolded

pytestmark = pytest.mark.slow

MODELS = Path(__file__).parent.parent.parent / "models"
CARDS = {name: card for name, card in read_cards(MODELS).items() if card.source.repo}
SIZES = {"S": (6, 64, 12), "B": (12, 64, 12), "L": (16, 64, 24), "XL": (16, 72, 28)}
"""heads, width of a head, blocks"""

DIT = {name: name for name in read_lists("dit")}
BIG = {
    "sd3-medium": ("sd3", "sd3-medium", 2_028_328_000),
    "sd3.5-large": ("sd3", "sd3.5-large", 8_056_627_520),
    "sd3.5-large-turbo": ("sd3", "sd3.5-large", 8_056_627_520),
    "sd3.5-medium": ("sd3", "sd3.5-medium", 2_243_171_520),
    "flux.1-schnell": ("flux", "flux-schnell", 11_891_178_560),
    "flux.1-dev": ("flux", "flux-dev", 11_901_408_320),
}
"""card: the list, its network there, parameters as published"""

UNETS = {
    "sd1.5": ("sd1", 859_520_964, ("ViT-L-14", None)),
    "sd2.1": ("sd2", 865_910_724, ("ViT-H-14", None)),
    "sd2.1-base": ("sd2", 865_910_724, ("ViT-H-14", None)),
    "sd-turbo": ("sd2", 865_910_724, ("ViT-H-14", None)),
    "sdxl": ("sdxl", 2_567_463_684, ("ViT-L-14", "ViT-bigG-14")),
    "sdxl-turbo": ("sdxl", 2_567_463_684, ("ViT-L-14", "ViT-bigG-14")),
    "sdxl-refiner": ("sdxl-refiner", 2_259_526_660, (None, "ViT-bigG-14")),
}
"""card: its network's list, parameters as published, the lists of its text encoders"""

CLIPS = {"ViT-L-14": 123_060_480, "ViT-H-14": 340_387_840, "ViT-bigG-14": 694_659_840}
"""Parameters that a model keeps of each: CLIP-L without its projection, OpenCLIP-H without that and the last block."""


@lru_cache
def listed(name: str) -> dict[str, Shapes]:
    return read_lists(name)


def outline(shapes: Shapes, class_name: str, part: str = "transformer") -> dict[str, torch.Tensor]:
    """A file of the authors' names and shapes as diffusers would name it, on the meta device."""
    state = {key: torch.empty(shape, device="meta") for key, shape in shapes.items()}
    return from_original(class_name, state, part)


def built(folder: Path, class_name: str, tensors: dict[str, torch.Tensor]) -> nn.Module:
    """The network of a config, which takes exactly these tensors."""
    network = blank_network(class_name, folder, tensors)
    wanted = {key: value.shape for key, value in network.state_dict().items()}
    assert {key: value.shape for key, value in tensors.items()} == wanted
    return network


def learnt(network: nn.Module) -> int:
    return sum(parameter.numel() for parameter in network.parameters())


def dit_folder(name: str, folder: Path) -> Path:
    """The shipped config of the XL/2, changed to another size: "DiT-S/8 256"."""
    form, pixels = name.removeprefix("DiT-").split()
    size, patch = form.split("/")
    heads, width, blocks = SIZES[size]
    config = json.loads((MODELS / "dit-xl-2-256" / "transformer" / "config.json").read_text())
    config |= {"num_attention_heads": heads, "attention_head_dim": width, "num_layers": blocks}
    config |= {"patch_size": int(patch), "sample_size": int(pixels) // 8}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", DIT)
def test_a_dit_has_the_tensors_of_the_authors_code(name: str, tmp_path: Path) -> None:
    shapes = listed("dit")[name]
    network = built(
        dit_folder(name, tmp_path), "Transformer2DModel", outline(shapes, "Transformer2DModel", "transformer")
    )
    # The authors count their table of positions, which diffusers' network computes.
    positions = network.get_buffer("pos_embed.pos_embed")
    assert positions.shape == shapes["pos_embed"]
    assert learnt(network) + positions.numel() == sum(torch.Size(shape).numel() for shape in shapes.values())


def test_the_lists_have_all_dits() -> None:
    assert set(DIT) == {f"DiT-{size}/{patch} 256" for size in SIZES for patch in (2, 4, 8)} | {"DiT-XL/2 512"}


@pytest.mark.parametrize("pixels", [256, 512])
def test_the_shipped_dits_are_those(pixels: int) -> None:
    card = CARDS[f"dit-xl-2-{pixels}"]
    shapes = listed("dit")[f"DiT-XL/2 {pixels}"]
    network = built(
        card.folder / "transformer", "Transformer2DModel", outline(shapes, "Transformer2DModel", "transformer")
    )
    assert card.parameters == sum(torch.Size(shape).numel() for shape in shapes.values())
    assert card.parameters == {256: 675_129_632, 512: 676_014_368}[pixels]
    assert sum(tensor.numel() for tensor in network.state_dict().values()) == 749_826_464, "with diffusers' copies"
    assert learnt(network) == 674_834_720


@pytest.mark.parametrize("name", BIG)
def test_an_sd3_and_a_flux_have_the_tensors_of_the_authors_code(name: str) -> None:
    group, title, parameters = BIG[name]
    class_name = json.loads((CARDS[name].folder / INDEX).read_text())["transformer"][1]
    tensors = outline(listed(group)[title], class_name)
    network = built(CARDS[name].folder / "transformer", class_name, tensors)
    assert learnt(network) == CARDS[name].parameters == parameters


@pytest.mark.parametrize("name", BIG)
def test_an_autoencoder_has_the_tensors_of_the_authors_code(name: str) -> None:
    shapes = listed(BIG[name][0])["autoencoder"]
    network = built(CARDS[name].folder / "vae", "AutoencoderKL", outline(shapes, "AutoencoderKL", "vae"))
    assert learnt(network) == sum(torch.Size(shape).numel() for shape in shapes.values()) == 83_819_683


@pytest.mark.parametrize("name", UNETS)
def test_a_unet_has_the_tensors_of_the_authors_code(name: str) -> None:
    title, parameters, _ = UNETS[name]
    tensors = outline(listed("unet")[title], "UNet2DConditionModel", "unet")
    network = built(CARDS[name].folder / "unet", "UNet2DConditionModel", tensors)
    assert learnt(network) == CARDS[name].parameters == parameters


@pytest.mark.parametrize("name", UNETS)
def test_the_text_encoders_of_a_unet_have_the_tensors_of_the_authors_code(name: str) -> None:
    """As they stand in a single file; CLIP-L has transformers' names there, and here open_clip's, of the same code."""
    for part, title in zip(("text_encoder", "text_encoder_2"), UNETS[name][2], strict=True):
        folder = ModelFolder(CARDS[name], CARDS).beside()
        classes = {one.name: one for one in folder.parts() if one.name.startswith("text_encoder")}
        assert (part in classes) == (title is not None)
        if title is None:
            continue
        prefix = "cond_stage_model.model." if part == "text_encoder" else "conditioner.embedders.1.model."
        shapes = {prefix + key: shape for key, shape in listed("clip")[title].items()}
        own = classes[part]
        tensors = clip_keys(outline(shapes, own.class_name, part), outline_of(own.class_name, own.folder))
        assert learnt(built(own.folder, own.class_name, tensors)) == CLIPS[title]


@pytest.mark.parametrize("name", UNETS)
def test_the_autoencoder_of_a_unet_has_the_tensors_of_the_authors_code(name: str) -> None:
    """SD3's authors' list, with four latent channels and the two convolutions around them (autoencoder.py)."""
    place = ModelFolder(CARDS[name], CARDS).beside()
    own = next(one for one in place.parts() if one.name == "vae")
    shapes = dict(listed("sd3")["autoencoder"])
    for half, layer in (("encoder", "conv_out"), ("decoder", "conv_in")):
        for kind in ("weight", "bias"):
            key = f"{half}.{layer}.{kind}"
            shapes[key] = tuple({32: 8, 16: 4}.get(size, size) for size in shapes[key])
    shapes |= {"quant_conv.weight": (8, 8, 1, 1), "quant_conv.bias": (8,)}
    shapes |= {"post_quant_conv.weight": (4, 4, 1, 1), "post_quant_conv.bias": (4,)}
    network = built(own.folder, "AutoencoderKL", outline(shapes, "AutoencoderKL", "vae"))
    assert learnt(network) == sum(torch.Size(shape).numel() for shape in shapes.values()) == 83_653_863


def test_another_size_is_refused(tmp_path: Path) -> None:
    """Controls: lists of the next larger network, and one with a tensor too many."""
    shapes = listed("dit")["DiT-XL/2 256"]
    with pytest.raises(CheckpointError):
        built(
            dit_folder("DiT-L/2 256", tmp_path),
            "Transformer2DModel",
            outline(shapes, "Transformer2DModel", "transformer"),
        )
    tensors = outline(listed("sd3")["sd3.5-medium"], "SD3Transformer2DModel")
    with pytest.raises(CheckpointError):
        built(CARDS["sd3-medium"].folder / "transformer", "SD3Transformer2DModel", tensors)
    for card, title in (("sd1.5", "sd2"), ("sdxl", "sdxl-refiner")):
        tensors = outline(listed("unet")[title], "UNet2DConditionModel", "unet")
        with pytest.raises(CheckpointError, match=r"has shape|weights"):
            built(CARDS[card].folder / "unet", "UNet2DConditionModel", tensors)
    tensors = outline(listed("flux")["flux-dev"], "FluxTransformer2DModel")
    with pytest.raises(CheckpointError, match="guidance"):
        built(CARDS["flux.1-schnell"].folder / "transformer", "FluxTransformer2DModel", tensors)


def stored(class_name: str, folder: Path) -> int:
    """Numbers in the files of a part: all names of its state, less the one that transformers ties to another."""
    tensors = outline_of(class_name, folder)
    return sum(value.numel() for key, value in tensors.items() if key != "encoder.embed_tokens.weight")


@pytest.mark.parametrize("name", CARDS)
def test_a_card_tells_what_is_downloaded(name: str) -> None:
    """Every part's numbers in the format of its repository: float32 for the DiTs, two bytes for the others."""
    card = CARDS[name]
    parts = json.loads((card.folder / INDEX).read_text())
    networks = {part: entry[1] for part, entry in parts.items() if isinstance(entry, list) and has_weights(entry[1])}
    own = {part: class_name for part, class_name in networks.items() if part not in card.components}
    numbers = sum(stored(class_name, card.folder / part) for part, class_name in own.items())
    assert card.bytes == numbers * (4 if card.family == "dit" else 2)


def test_folding_is_undone_by_unfolding() -> None:
    shapes: Shapes = {f"a.{i}.b.{j}.c1": (i // 2, 3) for i in range(4) for j in range(3)}
    shapes |= {"a.7.b.0.c1": (1,), "mlp.0.w": (2, 2), "mlp.2.w": (2, 2), "plain": ()}
    lines = folded(shapes)
    assert {key: shape for line in lines for key, shape in unfolded(line).items()} == shapes
    assert "a.{0-1}.b.{0-2}.c1 [0, 3]" in lines and len(lines) == 6
