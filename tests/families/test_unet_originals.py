"""U-Nets and OpenCLIPs by their authors' names: the same tensors as diffusers' own converters give, each name used."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from diffusers.loaders import single_file_utils

from app.families.authors import find_part, from_original, parts_in
from tests.parts import originals
from tests.parts.tiny_unets import write_unet

State = dict[str, torch.Tensor]
XL = ("sdxl", "refiner")
PREFIXES = {"sd15": None, "sd2": "cond_stage_model.model.", "sdxl": "conditioner.embedders.1.model."}
PREFIXES["refiner"] = "conditioner.embedders.0.model."


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """By kind; with two layers in each block, as all published ones have."""
    place = tmp_path_factory.mktemp("unets")
    for kind in PREFIXES:
        write_unet(place / kind, kind, layers_per_block=2)
    return {kind: place / kind for kind in PREFIXES}


def same(found: State, wanted: State) -> bool:
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


def prefixed(state: State, prefix: str = "text_model.") -> State:
    """As transformers named a CLIP's tensors before version 5."""
    bare = ("text_model.", "text_projection.")
    return {name if name.startswith(bare) else prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("kind", PREFIXES)
def test_a_unet(folders: dict[str, Path], kind: str) -> None:
    own = originals.read(folders[kind] / "unet")
    file = originals.unet_file(folders[kind])
    found = from_original("UNet2DConditionModel", file, "unet")
    assert same(found, own)
    config: Any = {"layers_per_block": 2, "addition_embed_type": "text_time" if kind in XL else None}
    theirs = single_file_utils.convert_ldm_unet_checkpoint(file, config)  # type: ignore[no-untyped-call]
    assert same(found, theirs)
    assert {value.data_ptr() for value in found.values()} <= {value.data_ptr() for value in file.values()}, "views"


@pytest.mark.parametrize("kind", [kind for kind, prefix in PREFIXES.items() if prefix])
def test_an_open_clip(folders: dict[str, Path], kind: str) -> None:
    part = "text_encoder" if kind == "sd2" else "text_encoder_2"
    class_name = "CLIPTextModel" if kind == "sd2" else "CLIPTextModelWithProjection"
    own, file = prefixed(originals.read(folders[kind] / part)), originals.unet_file(folders[kind])
    found = find_part(part, class_name, file.keys()).read(class_name, file)
    assert same(found, own)
    network = SimpleNamespace(config=SimpleNamespace(hidden_size=24))
    theirs: State = single_file_utils.convert_open_clip_checkpoint(  # type: ignore[no-untyped-call]
        network, file, prefix=PREFIXES[kind]
    )
    theirs.pop("text_projection.weight", None) if kind == "sd2" else None
    assert same(found, {name: value for name, value in theirs.items() if ".layers.23." not in name})
    meta = {name: value.to("meta") for name, value in file.items()}
    outline = find_part(part, class_name, meta.keys()).read(class_name, meta)
    assert {name: value.shape for name, value in outline.items()} == {name: value.shape for name, value in own.items()}


def test_a_file_of_other_tools_lacks_the_block_that_nobody_uses(folders: dict[str, Path]) -> None:
    """diffusers' convert_diffusers_to_original_stable_diffusion.py writes 23 blocks and no projection."""
    own = originals.read(folders["sd2"] / "text_encoder")
    file = {f"cond_stage_model.model.{name}": value for name, value in originals.open_clip(own).items()}
    assert same(from_original("CLIPTextModel", file, "text_encoder"), prefixed(own))


@pytest.mark.parametrize(
    ("kind", "parts"),
    [
        ("sd15", {"text_encoder": "CLIP-L"}),
        ("sd2", {"text_encoder": "OpenCLIP-H"}),
        ("sdxl", {"text_encoder": "CLIP-L", "text_encoder_2": "OpenCLIP-G"}),
        ("refiner", {"text_encoder_2": "OpenCLIP-G"}),
    ],
)
def test_which_parts_a_file_has(folders: dict[str, Path], kind: str, parts: dict[str, str]) -> None:
    found = parts_in(originals.unet_file(folders[kind]).keys())
    assert {part: one.name for part, one in found.items()} == {"unet": "U-Net", "vae": "VAE", **parts}


@pytest.mark.parametrize(
    "name",
    [
        "input_blocks.1.0.in_layers.4.weight",
        "input_blocks.1.2.conv.weight",
        "input_blocks.01.0.in_layers.0.weight",
        "middle_block.3.norm.weight",
        "label_emb.1.0.weight",
        "output_blocks.2.3.conv.weight",
        "something.weight",
    ],
)
def test_a_name_that_no_rule_reads_is_refused(folders: dict[str, Path], name: str) -> None:
    """diffusers' converter leaves it out without a word."""
    file = originals.unet_file(folders["sdxl"]) | {f"model.diffusion_model.{name}": torch.ones(2)}
    with pytest.raises(ValueError, match="unexpected weights") as caught:
        from_original("UNet2DConditionModel", file, "unet")
    assert name in str(caught.value)
    other = {f"conditioner.embedders.1.model.{name}": torch.ones(2)}
    with pytest.raises(ValueError, match="unexpected weights"):
        from_original("CLIPTextModelWithProjection", originals.unet_file(folders["sdxl"]) | other, "text_encoder_2")


def test_a_projection_that_is_missing_is_not_made_up(folders: dict[str, Path]) -> None:
    """As it is for SD3's CLIP-L, of which files have none."""
    file = originals.unet_file(folders["sdxl"])
    del file["conditioner.embedders.1.model.text_projection"]
    found = from_original("CLIPTextModelWithProjection", file, "text_encoder_2")
    assert (
        "text_projection.weight" not in found
        and len(found) == len(originals.read(folders["sdxl"] / "text_encoder_2")) - 1
    )


def test_two_tensors_of_one_name_are_refused(folders: dict[str, Path]) -> None:
    """The two places where an upsampler may stand."""
    file = originals.unet_file(folders["sdxl"])
    again = {name.replace(".2.conv.", ".1.conv."): value for name, value in file.items() if ".2.conv." in name}
    with pytest.raises(ValueError, match="stands in the file twice"):
        from_original("UNet2DConditionModel", file | again, "unet")


def test_a_projection_that_is_no_matrix_is_refused(folders: dict[str, Path]) -> None:
    file = originals.unet_file(folders["sdxl"]) | {"conditioner.embedders.1.model.text_projection": torch.ones(24)}
    with pytest.raises(ValueError, match="is not a matrix"):
        from_original("CLIPTextModelWithProjection", file, "text_encoder_2")
