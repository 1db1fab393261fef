"""LoRA files of U-Nets: every trainer's names, convolutions too, and what is no LoRA of this U-Net."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from app.checkpoints.tensors import read_metadata
from app.families.adapters import Adapted, LoRA, Span, lay_out
from app.families.components import network_of
from app.families.lora import Matched, match
from tests.parts.close import FORWARD, apart, close
from tests.parts.tiers import tiers
from tests.parts.tiny_parts import read_state
from tests.parts.tiny_unets import write_unet
from tests.parts.unet_loras import TEXT, Format, Pairs, draw, write

CLASSES = {"unet": "UNet2DConditionModel", "text_encoder": "CLIPTextModel"}
CLASSES["text_encoder_2"] = "CLIPTextModelWithProjection"
BLOCKS = r"^unet\..*(attn|\.ff\.|proj_in|proj_out)"
EVERY = {
    "sd15 kohya": ("sd15", "kohya", rf"{BLOCKS}|^text_encoder\."),
    "sd2 kohya": ("sd2", "kohya", rf"{BLOCKS}|^text_encoder\."),
    "sdxl kohya": ("sdxl", "kohya", rf"{BLOCKS}|^text_encoder(_2)?\..*(attn|mlp)"),
    "sdxl sgm": ("sdxl", "sgm", rf"{BLOCKS}|^text_encoder(_2)?\..*(attn|mlp)"),
    "refiner sgm": ("refiner", "sgm", BLOCKS),
    "sd15 every layer": ("sd15", "kohya", "^unet"),
    "sdxl every layer": ("sdxl", "sgm", "^unet"),
    "sdxl peft": ("sdxl", "peft", ""),
    "sd15 old": ("sd15", "old", r"^unet\..*attn[12]\.to_"),
}
"""The model, the format, and the layers."""


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    place = tmp_path_factory.mktemp("unets")
    for kind in ("sd15", "sd2", "sdxl", "refiner"):
        write_unet(place / kind, kind, layers_per_block=2)
    return {kind: place / kind for kind in ("sd15", "sd2", "sdxl", "refiner")}


def networks(folder: Path) -> dict[str, nn.Module]:
    return {part: network_of(kind, folder / part) for part, kind in CLASSES.items() if (folder / part).is_dir()}


def matched(file: Path, folder: Path) -> Matched:
    return match(read_state(file), networks(folder), read_metadata(file))


@pytest.mark.parametrize("case", tiers(zip(EVERY, strict=True), {"sdxl kohya", "refiner sgm", "sd15 old"}.__contains__))
def test_every_pair_finds_its_layer(folders: dict[str, Path], tmp_path: Path, case: str) -> None:
    kind, format, only = EVERY[case]
    pairs = draw(folders[kind], only)
    file = write(tmp_path / "a.safetensors", folders[kind], format, pairs, None if format == "old" else 2.0)
    found = match(read_state(file), networks(folders[kind]), read_metadata(file) if format != "peft" else {})
    assert found.unmatched == ()
    bare = {(part, name.removeprefix("text_model.")): pair for (part, name), pair in found.pairs.items()}
    assert bare.keys() == {(part, name.removeprefix("text_model.")) for part, name in pairs}
    for (part, name), (down, up) in pairs.items():
        ours = bare[part, name.removeprefix("text_model.")]
        scale = 2.0 / len(down) if format in ("kohya", "sgm") else 1.0
        assert torch.equal(ours[0], down) and torch.allclose(ours[1], scale * up.flatten(1), rtol=1e-6)


def test_alpha_of_a_unet_in_the_settings_of_peft(folders: dict[str, Path], tmp_path: Path) -> None:
    pairs = draw(folders["sdxl"], r"^unet\..*to_q|^text_encoder_2\..*q_proj", ranks=(4,))
    file = write(tmp_path / "a.safetensors", folders["sdxl"], "peft", pairs, alpha=6.0)
    for key, (_, up) in matched(file, folders["sdxl"]).pairs.items():
        _, theirs = pairs.get(key) or pairs[key[0], f"text_model.{key[1]}"]
        assert torch.allclose(up, 1.5 * theirs)


@pytest.mark.parametrize(
    ("of", "on", "format", "words"),
    [
        ("sdxl", "sd15", "sgm", "is a LoRA of SDXL, by its names"),
        ("sdxl", "sd2", "kohya", "is a LoRA of SDXL, by its names"),
        ("sd15", "sd2", "kohya", "is for a width of 8 x 1 x 1, this network has 8"),
        ("sd15", "sdxl", "kohya", "is for a width of"),
        ("sd2", "sd15", "peft", "is for a width of"),
        ("refiner", "sdxl", "sgm", "is for a width of"),
    ],
)
def test_a_lora_of_another_unet_is_named(
    folders: dict[str, Path], tmp_path: Path, of: str, on: str, format: Format, words: str
) -> None:
    file = write(tmp_path / "a.safetensors", folders[of], format, draw(folders[of], BLOCKS))
    with pytest.raises(ValueError, match=words):
        matched(file, folders[on])


def test_a_unet_takes_no_lora_of_a_transformer(folders: dict[str, Path], checkpoints: Path, tmp_path: Path) -> None:
    """And a transformer none of a U-Net."""
    file = write(tmp_path / "a.safetensors", folders["sdxl"], "sgm", draw(folders["sdxl"], BLOCKS))
    sd3 = {"transformer": network_of("SD3Transformer2DModel", checkpoints / "sd3" / "transformer")}
    with pytest.raises(ValueError, match="is a LoRA of SDXL, by its names"):
        match(read_state(file), sd3)
    own = "lora_unet_joint_blocks_0_x_block_attn_proj.{}.weight"
    state = {own.format("lora_down"): torch.ones(2, 32), own.format("lora_up"): torch.ones(32, 2)}
    with pytest.raises(ValueError, match="is a LoRA of Stable Diffusion 3, by its names"):
        match(state, networks(folders["sdxl"]))


@pytest.mark.parametrize(
    ("down", "up", "words"),
    [
        ((2, 8, 3, 3), (8, 2, 3, 3), "do not agree"),
        ((2, 8, 3, 3), (8, 2), "do not agree"),
        ((2, 8, 1, 1), (8, 2, 1, 1), "is for a width of 8 x 1 x 1, this network has 8 x 3 x 3"),
        ((2, 8), (8, 2), "is for a width of 8, this network has 8 x 3 x 3"),
    ],
)
def test_a_kernel_that_is_not_the_layers(
    folders: dict[str, Path], down: tuple[int, ...], up: tuple[int, ...], words: str
) -> None:
    stem = "lora_unet_down_blocks_0_resnets_0_conv1"
    state = {f"{stem}.lora_down.weight": torch.ones(down), f"{stem}.lora_up.weight": torch.ones(up)}
    with pytest.raises(ValueError, match=words):
        match(state, networks(folders["sd15"]))


def test_queries_of_cross_attention_have_an_input_of_their_own(folders: dict[str, Path]) -> None:
    """They are as wide as the picture's features, keys and values as the text."""
    pairs = draw(folders["sd2"], r"^unet\.mid_block\..*attn[12]\.to_[qkv]", ranks=(4,))
    tensors, places = lay_out({key: (down, up.flatten(1)) for key, (down, up) in pairs.items()})
    block = "mid_block.attentions.0.transformer_blocks.0"
    shapes = {name: tensors[places["unet", f"{block}.{name}"].down].shape for name in ("attn1.to_q", "attn1.to_v")}
    shapes |= {name: tensors[places["unet", f"{block}.{name}"].down].shape for name in ("attn2.to_q", "attn2.to_v")}
    assert shapes == {"attn1.to_q": (12, 16), "attn1.to_v": (12, 16), "attn2.to_q": (4, 16), "attn2.to_v": (8, 24)}


@pytest.mark.parametrize("shape", [(1, 0, 1, 1), (3, 1, 1, 1), (3, 1, 2, 1), (5, 2, 1, 1), (3, 2, 1, 2)])
@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last])
def test_a_convolution_grows_by_the_pair(shape: tuple[int, ...], memory: torch.memory_format) -> None:
    """For some passes, with weights of their own; beside a convolution of which the weights were changed."""
    kernel, padding, stride, dilation = shape
    dice = torch.Generator().manual_seed(1)
    plain = nn.Conv2d(6, 5, kernel, stride, padding, dilation).to(memory_format=memory).requires_grad_(False)
    network = nn.Sequential(plain)
    down = torch.randn(3, 6, kernel, kernel, generator=dice) * 0.3
    up, x = torch.randn(5, 3, generator=dice), torch.randn(4, 6, 9, 7, generator=dice)
    lora = LoRA({("unet", "0"): (down, up)}, {"unet": network})
    lora.load_state_dict(lay_out({("unet", "0"): (down, up)})[0], assign=True)
    weights = torch.tensor([0.5, -2.0]).view(-1, 1, 1)
    with torch.inference_mode(), Adapted(network, [Span(slice(1, 3), lora, weights)]):
        ours = network(x)
    wanted = plain(x)
    for passed, weight in ((1, 0.5), (2, -2.0)):
        grown = plain.weight + weight * (up @ down.flatten(1)).view_as(plain.weight)
        wanted[passed] = nn.functional.conv2d(x[passed], grown, plain.bias, stride, padding, dilation)
    close(ours, wanted, FORWARD)
    apart(ours, plain(x), FORWARD)
    assert torch.equal(network(x), plain(x)), "as before, outside"


def test_the_text_encoders_are_those_of_the_model(folders: dict[str, Path], tmp_path: Path) -> None:
    """sd-scripts calls SDXL's first CLIP te1 and the only one of SD 1.5 te."""
    for kind, parts in (("sd15", TEXT[:1]), ("sdxl", TEXT)):
        pairs: Pairs = draw(folders[kind], r"^text_encoder(_2)?\..*q_proj")
        file = write(tmp_path / f"{kind}.safetensors", folders[kind], "kohya", pairs)
        assert {part for part, _ in matched(file, folders[kind]).pairs} == {*parts}
