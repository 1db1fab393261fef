"""Originals: the authors' own layouts give the networks that the authors wrote, tensor for tensor and in a forward."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.loaders import single_file_utils as theirs

from app.families.authors import from_original
from tests.families import plain_originals
from tests.families.plain_shapes import (
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
from tests.parts.close import EXACT, FORWARD, apart, close
from tests.seeds import plain_dit
from tests.seeds.plain_dit import doubled

FLUX, SD3, VAE = "FluxTransformer2DModel", "SD3Transformer2DModel", "AutoencoderKL"
UNET = "model.diffusion_model."
AXES = (4, 6, 6)
SQUARES = 1e-7
"""In float64 too, diffusers takes the mean square of queries and keys in float32."""


def filled(kind: Any, state: State, **config: Any) -> Any:
    """The network in float64, so that what differs is no rounding."""
    network = kind(**config).eval().requires_grad_(False)
    network.load_state_dict(state, strict=True)
    return network.double()


def wide(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
    return tuple(tensor.double() for tensor in tensors)


def turned(state: State, ending: str) -> State:
    """The first tensor of this ending turned over, as a control."""
    key = next(key for key in state if key.endswith(ending))
    return {**state, key: state[key].flip(-1)}


# What SD3-medium, SD3.5-large and SD3.5-medium are like, in this order; each with the prefix of some files.
SD3S: list[tuple[str, dict[str, Any]]] = [
    (UNET, {}),
    ("", {"norm": True}),
    (UNET, {"norm": True, "dual": 2}),
]


@pytest.mark.parametrize(("prefix", "kind"), SD3S)
@pytest.mark.parametrize(("width", "depth"), [(32, 3), (48, 1)])
def test_sd3(prefix: str, kind: dict[str, Any], width: int, depth: int) -> None:
    state = drawn(sd3_shapes(width, depth, **{**kind, "dual": min(kind.get("dual", 0), depth)}))
    found = from_original(SD3, prefixed(prefix, state))
    same(found, theirs.convert_sd3_transformer_checkpoint_to_diffusers(dict(state)))
    network = filled(
        SD3Transformer2DModel, found, patch_size=2, in_channels=4, out_channels=4, num_layers=depth,
        attention_head_dim=16, num_attention_heads=width // 16, joint_attention_dim=48, caption_projection_dim=width,
        pooled_projection_dim=40, pos_embed_max_size=12, qk_norm="rms_norm" if kind.get("norm") else None,
        dual_attention_layers=tuple(range(min(kind.get("dual", 0), depth))),
    )  # fmt: skip
    t, (x, pooled, text) = torch.tensor([900.0, 31.0]), wide(random(2, 4, 12, 8), random(2, 40), random(2, 5, 48))
    state = doubled(state)
    wanted = plain_originals.sd3(state, width // 16, x, t, pooled, text)
    ours = network(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t, return_dict=False)[0]
    close(ours, wanted, SQUARES if kind.get("norm") else EXACT)
    apart(ours, plain_originals.sd3(turned(state, "qkv.weight"), width // 16, x, t, pooled, text), FORWARD)


@pytest.mark.parametrize("guided", [False, True], ids=["schnell", "dev"])
@pytest.mark.parametrize(("width", "double", "single"), [(32, 2, 3), (48, 1, 1)])
def test_flux(guided: bool, width: int, double: int, single: int) -> None:
    """diffusers' own converter only takes a width of 3072; here a forward is the judge."""
    state = drawn(flux_shapes(width, double, single, guided=guided))
    found = from_original(FLUX, state)
    network = filled(
        FluxTransformer2DModel, found, patch_size=1, in_channels=16, num_layers=double, num_single_layers=single,
        attention_head_dim=16, num_attention_heads=width // 16, joint_attention_dim=48, pooled_projection_dim=16,
        guidance_embeds=guided, axes_dims_rope=AXES,
    )  # fmt: skip
    t, (image, text, pooled) = torch.tensor([0.9, 0.3]), wide(random(2, 6, 16), random(2, 5, 48), random(2, 16))
    state = doubled(state)
    places = torch.tensor([[0.0, row, column] for row in range(2) for column in range(3)])
    guidance = torch.tensor([3.5, 1.0]) if guided else None
    wanted = plain_originals.flux(state, width // 16, image, places, text, pooled, t, guidance, AXES)
    ours = network(image, text, pooled, t, places, torch.zeros(5, 3), guidance=guidance, return_dict=False)[0]
    close(ours, wanted, SQUARES)
    wrong = turned(state, "linear1.weight")
    apart(ours, plain_originals.flux(wrong, width // 16, image, places, text, pooled, t, guidance, AXES), FORWARD)


@pytest.mark.parametrize(("prefix", "latent", "quant"), [("", 16, False), ("first_stage_model.", 4, True)])
@pytest.mark.parametrize("widths", [(8, 16, 16), (8,)], ids=["three levels", "one"])
def test_vae(prefix: str, latent: int, quant: bool, widths: tuple[int, ...]) -> None:
    state = drawn(vae_shapes(widths, latent, quant=quant))
    found = from_original(VAE, prefixed(prefix, state), "vae")
    config = {
        "down_block_types": ("DownEncoderBlock2D",) * len(widths),
        "up_block_types": ("UpDecoderBlock2D",) * len(widths),
    }
    if len(widths) > 1:  # diffusers' converter tells the attention of the middle from resnets only then
        same(found, theirs.convert_ldm_vae_checkpoint(dict(state), config))
    network = filled(
        AutoencoderKL, found, block_out_channels=widths, latent_channels=latent, layers_per_block=1, norm_num_groups=4,
        use_quant_conv=quant, use_post_quant_conv=quant, **config,
    )  # fmt: skip
    state, (z, x) = doubled(state), wide(random(2, latent, 4, 6), random(2, 3, 16, 8))
    ours, coded = network.decode(z, return_dict=False)[0], network.encode(x).latent_dist.parameters
    close(ours, plain_originals.decoded(state, z, 4), EXACT)
    close(coded, plain_originals.encoded(state, x, 4), EXACT)
    apart(ours, plain_originals.decoded(turned(state, "decoder.conv_in.weight"), z, 4), FORWARD)
    apart(coded, plain_originals.encoded(turned(state, "encoder.conv_in.weight"), x, 4), FORWARD)


@pytest.mark.parametrize(("width", "depth", "patch", "side"), [(32, 3, 2, 4), (48, 2, 4, 2), (32, 1, 8, 1)])
def test_dit(width: int, depth: int, patch: int, side: int) -> None:
    state = dit_state(width, depth, patch, side)
    found = from_original("DiTTransformer2DModel", state)
    for name in ("timestep_embedder.linear_1.weight", "timestep_embedder.linear_2.bias"):
        assert len({id(found[f"transformer_blocks.{block}.norm1.emb.{name}"]) for block in range(depth)}) == 1
    network = filled(
        DiTTransformer2DModel, found, num_attention_heads=width // 16, attention_head_dim=16, in_channels=4,
        out_channels=8, num_layers=depth, sample_size=side * patch, patch_size=patch, num_embeds_ada_norm=10,
    )  # fmt: skip
    for module in network.modules():  # the authors' arithmetic, where diffusers has another
        if isinstance(module, torch.nn.LayerNorm):
            module.eps = 1e-6
        if hasattr(module, "downscale_freq_shift"):
            module.downscale_freq_shift = 0
    x, t, y = random(2, 4, side * patch, side * patch).double(), torch.tensor([999, 3]), torch.tensor([10, 4])
    wanted = plain_dit.forward(doubled(state), width // 16, x, t, y)
    ours = network(x, timestep=t, class_labels=y, return_dict=False)[0]
    close(ours, wanted, EXACT)
    apart(ours, plain_dit.forward(turned(doubled(state), "qkv.weight"), width // 16, x, t, y), FORWARD)


@pytest.mark.parametrize("layout", ["dit", "sd3", "flux", "vae"])
def test_outlines_have_the_same_names_and_shapes_and_cost_nothing(layout: str) -> None:
    states: dict[str, tuple[str, State]] = {
        "dit": ("DiTTransformer2DModel", dit_state()),
        "sd3": (SD3, drawn(sd3_shapes(32, 2, norm=True, dual=1))),
        "flux": (FLUX, drawn(flux_shapes(32, 1, 1, guided=True))),
        "vae": (VAE, drawn(vae_shapes((8, 16), 4, quant=True))),
    }
    class_name, state = states[layout]
    part = "vae" if layout == "vae" else "transformer"
    found = from_original(class_name, state, part)
    outline = from_original(class_name, {key: value.to("meta") for key, value in state.items()}, part)
    assert {key: value.shape for key, value in outline.items()} == {key: value.shape for key, value in found.items()}
    assert all(value.is_meta for value in outline.values())
    held = {value.untyped_storage().data_ptr() for value in state.values()}
    copied = sorted(key for key, value in found.items() if value.untyped_storage().data_ptr() not in held)
    swapped = {"sd3": ["norm_out.linear", "transformer_blocks.1.norm1_context.linear"], "flux": ["norm_out.linear"]}
    assert copied == [f"{name}.{kind}" for name in swapped.get(layout, []) for kind in ("bias", "weight")]
