"""Originals: which parts a file holds, and what cannot be read as any of them."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from app.families.authors import apply, find_part, from_original, parts_in, rule
from tests.families.plain_shapes import (
    CLIP,
    T5,
    State,
    dit_state,
    drawn,
    flux_shapes,
    prefixed,
    random,
    same,
    sd3_shapes,
    vae_shapes,
)
from tests.seeds import plain_dit

FLUX, SD3, VAE = "FluxTransformer2DModel", "SD3Transformer2DModel", "AutoencoderKL"
UNET = "model.diffusion_model."


def single_file() -> State:
    """What stands in Stability's file with everything inside."""
    clip = drawn(CLIP)
    second = {**drawn(CLIP, 1), "text_projection.weight": random(8, 8)}
    return {
        **prefixed(UNET, drawn(sd3_shapes(32, 2))),
        **prefixed("first_stage_model.", drawn(vae_shapes((8, 16), 4, quant=False))),
        **prefixed("text_encoders.clip_l.transformer.", clip),
        **prefixed("text_encoders.clip_g.transformer.", second),
        **prefixed("text_encoders.t5xxl.transformer.", drawn(T5)),
        "text_encoders.clip_l.logit_scale": torch.ones(()),
    }


def test_one_file_holds_parts_and_each_is_read_alone() -> None:
    state = single_file()
    held = parts_in(state.keys())
    assert {name: one.prefix for name, one in held.items()} == {
        "transformer": UNET,
        "vae": "first_stage_model.",
        "text_encoder": "text_encoders.clip_l.transformer.",
        "text_encoder_2": "text_encoders.clip_g.transformer.",
        "text_encoder_3": "text_encoders.t5xxl.transformer.",
    }
    assert held["transformer"].family == "sd3"
    clip = "CLIPTextModelWithProjection"
    first, second = from_original(clip, state, "text_encoder"), from_original(clip, state, "text_encoder_2")
    assert torch.equal(first["text_projection.weight"], torch.eye(8)), "SD3's authors take its state unprojected"
    assert torch.equal(second["text_projection.weight"], random(8, 8))
    assert "text_projection.weight" not in from_original("CLIPTextModel", state, "text_encoder")
    assert from_original("T5EncoderModel", state, "text_encoder_3").keys() == T5.keys()


def test_a_clips_own_projection_is_not_sd3s() -> None:
    """As diffusers' loader of single files does, and as the authors' code never uses it."""
    state = single_file() | {"text_encoders.clip_l.transformer.text_projection.weight": random(8, 8)}
    found = from_original("CLIPTextModelWithProjection", state, "text_encoder")
    assert torch.equal(found["text_projection.weight"], torch.eye(8))


def test_files_of_one_part_alone() -> None:
    assert list(parts_in(CLIP)) == ["text_encoder"] and list(parts_in(T5)) == ["text_encoder_3"]
    flux = {*flux_shapes(32, 1, 1, guided=False), *T5}
    assert list(parts_in(flux)) == ["text_encoder_2", "transformer"]
    for part in ("text_encoder", "text_encoder_2"):
        assert find_part(part, "CLIPTextModel", CLIP.keys()).name == "CLIP"
    assert parts_in(["transformer_blocks.0.attn.to_q.weight"]) == {}


def without(state: State, key: str) -> State:
    return {name: value for name, value in state.items() if name != key}


FUSED = "joint_blocks.0.x_block.attn.qkv.weight"
REFUSED: list[tuple[str, str, Callable[[], State], str]] = [
    ("transformer", FLUX, single_file, r"no transformer of class Flux.*it holds text_encoder \(CLIP-L\).*vae \(VAE\)"),
    ("transformer", SD3, lambda: {"a": random(1)}, "no part of a known layout is in it"),
    (
        "transformer",
        SD3,
        lambda: single_file() | {UNET + FUSED: random(97, 32)},
        r"qkv\.weight.*\[97, 32\].*q, k and v",
    ),
    ("transformer", SD3, lambda: single_file() | {UNET + FUSED: random(2, 3, 4)}, r"\[2, 3, 4\]"),
    ("transformer", SD3, lambda: single_file() | {UNET + FUSED: torch.ones(())}, r"shape \[\]"),
    ("transformer", SD3, lambda: single_file() | {UNET + "extra": random(1)}, "unexpected weights: extra"),
    (
        "transformer",
        SD3,
        lambda: single_file() | {UNET + "joint_blocks.900.x_block.attn.qkv.weight": random(96, 32)},
        r"missing weights: joint_blocks\.2, though it has joint_blocks\.900",
    ),
    ("transformer", FLUX, lambda: without(drawn(flux_shapes(32, 1, 1, guided=False)), "img_in.weight"), "linear1"),
    (
        "transformer",
        FLUX,
        lambda: drawn(flux_shapes(32, 1, 1, guided=False)) | {"single_blocks.0.linear1.bias": random(96)},
        r"linear1\.bias has shape \[96\]",
    ),
    (
        "transformer",
        FLUX,
        lambda: drawn(flux_shapes(32, 1, 1, guided=False)) | {"final_layer.adaLN_modulation.1.bias": random(63)},
        "shift and scale",
    ),
    (
        "transformer",
        "DiTTransformer2DModel",
        lambda: dit_state() | {"pos_embed": plain_dit.positions(32, 4).flip(1)},
        "pos_embed is not the sines and cosines of 4 by 4 places",
    ),
    ("transformer", "DiTTransformer2DModel", lambda: dit_state() | {"pos_embed": random(1, 15, 32)}, "not .1, side"),
    (
        "transformer",
        "DiTTransformer2DModel",
        lambda: dit_state() | {"pos_embed": torch.full((1, 16, 32), float("nan"))},
        "sines and cosines",
    ),
    (
        "vae",
        VAE,
        lambda: drawn(vae_shapes((8, 16), 4, quant=False)) | {"decoder.mid.attn_1.q.weight": random(16, 16, 3, 3)},
        "convolution of one pixel",
    ),
]


@pytest.mark.parametrize(("part", "class_name", "state", "told"), REFUSED, ids=[case[3][:30] for case in REFUSED])
def test_refused(part: str, class_name: str, state: Callable[[], State], told: str) -> None:
    with pytest.raises(ValueError, match=told):
        from_original(class_name, state(), part)


def test_two_tensors_of_one_name_are_refused() -> None:
    with pytest.raises(ValueError, match=r"b\.weight: c\.weight stands in the file twice"):
        apply((rule("a.*", "c.*"), rule("b.*", "c.*")), {"a.weight": random(1), "b.weight": random(1)})


def test_what_training_leaves_in_an_autoencoder_is_dropped() -> None:
    state = drawn(vae_shapes((8, 16), 4, quant=True))
    left = {"loss.logvar": random(1), "model_ema.num_updates": torch.ones((), dtype=torch.int64)}
    same(from_original(VAE, {**state, **left}, "vae"), from_original(VAE, state, "vae"))
    rules = [one for one in find_part("vae", VAE, state.keys()).rules if one != rule("loss.**")]
    with pytest.raises(ValueError, match=r"unexpected weights: loss\.logvar"):
        apply(rules, {**state, **left})
