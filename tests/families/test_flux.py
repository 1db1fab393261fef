"""FLUX.1's parts against diffusers' on the same files: one forward, the text, the image."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import FluxPipeline, FluxTransformer2DModel
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from app.cards.cards import read_card
from app.errors import InvalidValue
from app.families import Flux
from app.families.flux import pack, unpack
from app.families.vae import shapes
from app.request import ClassLabel, Prompt
from app.samplers.schedule import DynamicShift, Schedule
from app.samplers.table import at_size
from tests.families.plain import build, build_component
from tests.parts.close import EXACT, FORWARD, LEVELS, apart, beyond_rounding, close
from tests.parts.requests import passes
from tests.parts.tiny_parts import read_state, write_first_clip

PROMPT = Prompt("a red apple on a blue background", negative="green dog")
TEXTS = ("red apple", "", "a cat and a dog", "red apple", "moon")


@pytest.fixture(params=["schnell", "dev"])
def flux(request: pytest.FixtureRequest, fluxes: Path) -> Flux:
    return family(fluxes / request.param)


@cache
def family(folder: Path, dtype: torch.dtype = torch.float32) -> Flux:
    card = read_card(folder / "card.toml")
    return Flux(card, build(card, dtype), "cpu", dtype)


@cache
def pipeline(folder: Path) -> Any:
    return FluxPipeline.from_pretrained(folder)


def rows(flux: Flux) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Latents of an odd number of tokens, timesteps and guidance of five rows, all different."""
    x = torch.randn((5, *flux.latent_shape(40, 24)), generator=torch.Generator().manual_seed(1))
    t, guidance = torch.tensor([1000.0, 3.25, 500.0, 857.14, 120.0]), torch.tensor([3.5, 1.0, 0.0, 7.0, 2.25])
    return x, t, guidance


def forward(flux: Flux, x: torch.Tensor, t: torch.Tensor, guidance: torch.Tensor, texts: tuple[str, ...]) -> Any:
    conditions = flux.encode(passes([Prompt(text) for text in texts]), 24)
    return flux.denoise(x, t, {**conditions, "guidance": guidance} if flux.embedded else conditions)[0]


def test_a_mixed_batch_is_diffusers_row_by_row(flux: Flux) -> None:
    x, t, guidance = rows(flux)
    theirs = pipeline(flux.card.folder)
    with torch.inference_mode():
        together = forward(flux, x, t, guidance, TEXTS)
        for row, text in enumerate(TEXTS):
            embeds, pooled, text_ids = theirs.encode_prompt(text, max_sequence_length=24)
            out = theirs.transformer(
                hidden_states=theirs._pack_latents(x[row : row + 1], 1, 4, 6, 10),
                timestep=t[row : row + 1] / 1000,
                guidance=guidance[row : row + 1] if flux.embedded else None,
                pooled_projections=pooled,
                encoder_hidden_states=embeds,
                txt_ids=text_ids,
                img_ids=theirs._prepare_latent_image_ids(1, 3, 5, "cpu", torch.float32),
                return_dict=False,
            )[0]
            close(together[row : row + 1], theirs._unpack_latents(out, 24, 40, 4), FORWARD)


def test_each_thing_of_a_row_counts(flux: Flux) -> None:
    """The control: another timestep, text, guidance or place of the same tokens is far outside the bound."""
    x, t, guidance = rows(flux)
    turned = x.transpose(2, 3)
    others = [(x, t.roll(1), guidance, TEXTS), (x, t, guidance, TEXTS[1:] + TEXTS[:1])]
    others += [(x, t, guidance.roll(1), TEXTS)] if flux.embedded else []
    with torch.inference_mode():
        right = forward(flux, x, t, guidance, TEXTS)
        for wrong in others:
            for pair in zip(forward(flux, *wrong)[::2], right[::2], strict=True):
                apart(*pair, 1e-3)
        apart(forward(flux, turned, t, guidance, TEXTS).transpose(2, 3), right, 1e-3)


def test_tokens_are_those_of_the_pipeline() -> None:
    x = torch.arange(2 * 3 * 4 * 6, dtype=torch.float32).view(2, 3, 4, 6)
    tokens = pack(x)
    assert torch.equal(tokens, FluxPipeline._pack_latents(x, 2, 3, 4, 6)) and torch.equal(unpack(tokens, 2, 3), x)


@pytest.mark.parametrize("length", [24, 33])
def test_text_is_encoded_as_the_pipeline_does(flux: Flux, length: int) -> None:
    with torch.inference_mode():
        ours = flux.encode(passes([PROMPT, Prompt("")]), length)
        text, pooled, _ = pipeline(flux.card.folder).encode_prompt([PROMPT.text, ""], max_sequence_length=length)
    assert text.shape == (2, length, 48) and pooled.shape == (2, 16)
    close(ours["text"], text, FORWARD)
    close(ours["pooled"], pooled, FORWARD)
    apart(ours["pooled"][:1], ours["pooled"][1:], 1e-3)


@pytest.mark.parametrize("batch", [None, 1, 2, 8])
def test_prompts_encoded_together_are_those_encoded_alone(flux: Flux, batch: int | None) -> None:
    sizes: list[int] = []
    hook = flux.clip[0].register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    with torch.inference_mode():
        together = flux.encode(passes([Prompt(text) for text in TEXTS]), 24, batch)
        hook.remove()
        for row, text in enumerate(TEXTS):
            for name, value in flux.encode(passes([Prompt(text)]), 24).items():
                close(together[name][row : row + 1], value, FORWARD)
    assert sizes == {None: [4], 1: [1] * 4, 2: [2, 2], 8: [8]}[batch]


def test_sd3s_clip_is_pooled_before_its_projection(fluxes: Path, tmp_path: Path) -> None:
    """One file of a CLIP-L under either class: as SD3's with a projection, or as FLUX's, which has none."""
    write_first_clip(tmp_path / "clip", tmp_path / "tokenizer", seed=5)
    card = read_card(fluxes / "schnell" / "card.toml")
    parts, state = build(card), read_state(tmp_path / "clip")
    ids = parts["tokenizer"](PROMPT.text, padding="max_length", max_length=24, return_tensors="pt").input_ids
    with torch.inference_mode():
        theirs = CLIPTextModelWithProjection.from_pretrained(tmp_path / "clip")
        right, projected = theirs.text_model(ids).pooler_output, theirs(ids).text_embeds
        for name in ("CLIPTextModelWithProjection", "CLIPTextModel"):
            parts["text_encoder"] = build_component(name, tmp_path / "clip", state, torch.float32)
            pooled = Flux(card, parts, "cpu", torch.float32).encode(passes([PROMPT]), 24)["pooled"]
            close(pooled, right, FORWARD)
            apart(pooled, projected, 1e-3)


@pytest.mark.parametrize("prefix", ["", "text_model."])
def test_a_clips_keys_with_and_without_their_prefix(fluxes: Path, prefix: str) -> None:
    part = fluxes / "dev" / "text_encoder"
    state = {prefix + key.removeprefix("text_model."): value for key, value in read_state(part).items()}
    ours = build_component("CLIPTextModel", part, state, torch.float32)
    assert_same(ours, CLIPTextModel.from_pretrained(part))


def test_every_tensor_of_the_network_is_upstreams(flux: Flux) -> None:
    assert_same(flux.network, FluxTransformer2DModel.from_pretrained(flux.card.folder / "transformer"))


def assert_same(ours: torch.nn.Module, theirs: torch.nn.Module) -> None:
    for kind in ("named_parameters", "named_buffers"):
        mine, wanted = dict(getattr(ours, kind)()), dict(getattr(theirs, kind)())
        assert mine.keys() == wanted.keys() and all(torch.equal(mine[key], wanted[key]) for key in wanted)


@pytest.mark.parametrize("absent", [("text_encoder",), ("text_encoder_2",), ("text_encoder", "text_encoder_2")])
def test_an_absent_encoder_is_zeros(fluxes: Path, absent: tuple[str, ...]) -> None:
    whole = family(fluxes / "dev")
    without = Flux(whole.card, {k: v for k, v in build(whole.card).items() if k not in absent}, "cpu", torch.float32)
    with torch.inference_mode():
        ours, full = without.encode(passes([PROMPT, Prompt("x")]), 30), whole.encode(passes([PROMPT, Prompt("x")]), 30)
    for part, name in (("text_encoder", "pooled"), ("text_encoder_2", "text")):
        assert full[name].any()
        assert torch.equal(ours[name], torch.zeros_like(full[name]) if part in absent else full[name])


def test_the_text_that_no_encoder_sees_is_told(fluxes: Path) -> None:
    whole, long = family(fluxes / "dev"), Prompt("a red Cat and the " * 5 + "End.")
    parts = build(whole.card)
    assert whole.truncated(Prompt("red apple"), 24) is None
    # Of the CLIP's 24 tokens 22 are words; the T5 spells out "Cat", but has room for all.
    assert whole.truncated(long, 23) == "Cat and the End." and whole.truncated(long, 60) is None
    for gone, told in (("text_encoder_2", "Cat and the End."), ("text_encoder", None)):
        left = Flux(whole.card, {k: v for k, v in parts.items() if k != gone}, "cpu", torch.float32)
        assert left.truncated(long, 60) == told


def test_decode_gives_the_pipelines_image_and_preview_resembles_it(flux: Flux) -> None:
    theirs = pipeline(flux.card.folder)
    with torch.inference_mode():
        latents = (theirs.vae.encode(shapes(2, 64)[:, :, :48]).latent_dist.mode() - 0.1159) * 0.3611
        image = theirs.vae.decode(latents / 0.3611 + 0.1159, return_dict=False)[0]
        ours, quick = flux.decode(latents), flux.preview(latents).float()
    for place, picture in enumerate(theirs.image_processor.postprocess(image, output_type="np")):
        close(ours[place], 255.0 * picture, LEVELS, beyond_rounding)
        apart(ours[place].flip(0), 255.0 * picture, LEVELS, beyond_rounding)
    assert ours.shape == quick.shape == (2, 48, 64, 3) and ours.dtype == torch.uint8
    even = ours.float().mean((0, 1, 2))
    assert (quick - ours).square().mean() < 0.7 * (even - ours).square().mean()


def test_bfloat16_rounds_the_timestep_as_the_authors_do(fluxes: Path) -> None:
    """What the sinusoids see: bfloat16(t) * 1000 for the authors' t in 0..1 (sampling.py, layers.py)."""
    flux, seen = family(fluxes / "dev", torch.bfloat16), []
    hook = flux.network.time_text_embed.time_proj.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    t = torch.linspace(1, 0, 29)[:28]
    shape = (len(t), *flux.latent_shape(16, 16))
    conditions = {name: value.expand(len(t), *value.shape[1:]) for name, value in flux.blank(4).items()}
    with torch.inference_mode():
        flux.denoise(torch.zeros(shape), 1000 * t, {**conditions, "guidance": torch.full((len(t),), 3.5)})
    hook.remove()
    assert torch.equal(seen[0], t.bfloat16() * 1000) and seen[1].unique().tolist() == [3504]
    assert not torch.equal(seen[0], (1000 * t).bfloat16())


@pytest.mark.parametrize(("width", "height"), [(16, 16), (40, 24), (64, 16)])
def test_shapes_and_the_shift_of_a_size(flux: Flux, width: int, height: int) -> None:
    assert flux.latent_shape(width, height) == (4, height // 4, width // 4)
    tokens = flux.image_tokens(width, height)
    assert tokens == (height // 8) * (width // 8)
    schedule = Schedule(kind="flow", spacing="flux", dynamic_shift=DynamicShift())
    close(np.log(at_size(schedule, tokens).shift), calculate_shift(tokens), EXACT)


def test_blank_opposite_and_labels(flux: Flux) -> None:
    shapes = {name: tuple(value.shape) for name, value in flux.blank(30).items()}
    assert shapes == {"text": (1, 30, 48), "pooled": (1, 16), **({"guidance": (1,)} if flux.embedded else {})}
    assert flux.opposite(PROMPT) == Prompt("green dog") and not flux.learned_variance
    with pytest.raises(InvalidValue):
        flux.encode(passes([ClassLabel(1)]), 24)
