"""DiT, run by the engine, against diffusers' DiTPipeline and a plain loop over diffusers' DDPM with the same noise."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler, DiTPipeline, DPMSolverMultistepScheduler

from app.cards.card import Limits, Sizes
from app.errors import CheckpointError, InvalidValue
from app.families import DiT
from app.pool.pool import Pool
from app.request import ClassLabel, Prompt
from app.samplers.schedule import Schedule
from tests.families.plain import ask, build, final, load, serve
from tests.parts.close import FORWARD, LEVELS, SAME, apart, beyond_rounding, close, furthest
from tests.parts.requests import passes

BASE = {"beta_start": 1e-4, "beta_end": 2e-2, "beta_schedule": "linear", "num_train_timesteps": 1000}
SCHEDULERS: dict[str, Any] = {
    "ddim": DDIMScheduler(**BASE, clip_sample=False),
    "dpmpp_2m": DPMSolverMultistepScheduler(**BASE, timestep_spacing="leading"),
}


def upstream(folder: Path, sampler: str, *, steps: int, guidance: float, label: int = 3) -> tuple[torch.Tensor, Any]:
    """The final latent, which the pipeline does not give but hands to its VAE, and the image in 0..1."""
    pipeline = DiTPipeline.from_pretrained(folder, scheduler=SCHEDULERS[sampler])
    pipeline.set_progress_bar_config(disable=True)
    seen: list[torch.Tensor] = []
    decode = pipeline.vae.decode
    pipeline.vae.decode = lambda z: (seen.append(z), decode(z))[1]
    generator = torch.Generator().manual_seed(0)
    images = pipeline(
        [label], guidance_scale=guidance, generator=generator, num_inference_steps=steps, output_type="np"
    ).images
    return seen[0] * pipeline.vae.config.scaling_factor, images


CASES = (("ddim", 8, 4.0), ("ddim", 5, 1.0), ("dpmpp_2m", 10, 4.0), ("dpmpp_2m", 4, 1.0))


@pytest.mark.parametrize(("sampler", "steps", "guidance"), CASES)
def test_latents_are_those_of_the_pipeline(
    checkpoints: Path, dit: DiT, pool: Pool, sampler: str, steps: int, guidance: float
) -> None:
    theirs, image = upstream(checkpoints / "dit", sampler, steps=steps, guidance=guidance)
    (ours,) = serve(pool, ask("dit", ClassLabel(3), steps=steps, guidance=guidance, sampler=sampler))
    close(final(ours), theirs, SAME)
    with torch.inference_mode():
        close(dit.decode(theirs), image * 255.0, LEVELS, beyond_rounding)


def test_the_image_is_that_of_the_pipeline(checkpoints: Path, pool: Pool) -> None:
    _, image = upstream(checkpoints / "dit", "dpmpp_2m", steps=10, guidance=4.0)
    (ours,) = serve(pool, ask("dit", ClassLabel(3), steps=10, guidance=4.0, sampler="dpmpp_2m"))
    close(ours.pixels, image[0] * 255.0, LEVELS, beyond_rounding)
    apart(ours.pixels[::-1], image[0] * 255.0, LEVELS, beyond_rounding)


def test_in_mixed_traffic_too(checkpoints: Path, dit: DiT, pool: Pool) -> None:
    """Every case at once, with a stochastic one and rows of other classes, samplers, steps and guidance."""
    asked = [
        ask("dit", ClassLabel(3), steps=steps, guidance=guidance, sampler=sampler, name=f"case-{case}")
        for case, (sampler, steps, guidance) in enumerate(CASES)
    ]
    asked.append(ask("dit", ClassLabel(207), steps=12, guidance=1.5, sampler="ddpm", name="ddpm"))
    near = [
        ask("dit", ClassLabel(400 + number), steps=steps, guidance=3.0, sampler=sampler, seed=number, name=str(number))
        for number, (sampler, steps) in enumerate((("ddpm", 7), ("heun", 3), ("euler_ancestral", 20)))
    ]
    results = serve(pool, *near, *asked)[len(near) :]
    assert all(result.timings.shared > 1 for result in results)
    theirs = [upstream(checkpoints / "dit", name, steps=steps, guidance=scale)[0] for name, steps, scale in CASES]
    theirs.append(plain_ddpm(dit, 207, steps=12, guidance=1.5))
    for ours, other in zip(results, theirs, strict=True):
        close(final(ours), other, SAME)


@pytest.mark.parametrize(
    "wrong", [{"steps": 7}, {"steps": 9}, {"guidance": 3.9}, {"guidance": 4.1}, {"label": 4}], ids=str
)
def test_controls_are_told_from_the_pipeline(checkpoints: Path, pool: Pool, wrong: dict[str, Any]) -> None:
    theirs, _ = upstream(checkpoints / "dit", "ddim", steps=8, guidance=4.0)
    options = {"steps": 8, "guidance": 4.0, **{key: value for key, value in wrong.items() if key != "label"}}
    (ours,) = serve(pool, ask("dit", ClassLabel(wrong.get("label", 3)), sampler="ddim", **options))
    apart(final(ours), theirs, SAME)


@torch.inference_mode()
def plain_ddpm(dit: DiT, label: int, *, steps: int, guidance: float) -> torch.Tensor:
    """diffusers' DDPM step with learned variance, guidance on the noise alone, noise from the same generator."""
    scheduler = DDPMScheduler(**BASE, clip_sample=False, variance_type="learned_range")
    # Its own alphas are float32, which is wrong in the fourth digit near t = 0.
    scheduler.alphas_cumprod = torch.cumprod(1 - torch.linspace(1e-4, 2e-2, 1000, dtype=torch.float64), 0)
    scheduler.set_timesteps(steps)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn((1, 4, 8, 8), generator=generator)
    labels = torch.tensor([label, 1000])
    for t in scheduler.timesteps:
        out = dit.network(x.repeat(2, 1, 1, 1), timestep=t.expand(2), class_labels=labels).sample
        eps = out[1:, :4] + guidance * (out[:1, :4] - out[1:, :4])
        x = scheduler.step(torch.cat([eps, out[:1, 4:]], 1), t, x, generator=generator).prev_sample.float()
    return x


def test_learned_variance_is_that_of_a_plain_loop(dit: DiT, pool: Pool) -> None:
    theirs = plain_ddpm(dit, 207, steps=12, guidance=1.5)
    options = {"condition": ClassLabel(207), "steps": 12, "guidance": 1.5, "sampler": "ddpm"}
    (ours,), (fixed,) = serve(pool, ask("dit", **options)), serve(pool, ask("fixed", **options))
    close(final(ours), theirs, SAME)
    apart(final(fixed), theirs, 1e-3)


def vars_of(dit: DiT) -> dict[str, Any]:
    return {"transformer": dit.network, "vae": dit.vae}


def test_a_row_in_a_mixed_batch_is_the_row_alone(dit: DiT) -> None:
    x = torch.randn((4, 4, 8, 8), generator=torch.Generator().manual_seed(1))
    t = torch.tensor([999.0, 0.0, 441.5, 857.14])
    labels = [ClassLabel(index) for index in (0, 999, 1000, 17)]
    with torch.inference_mode():
        out, frac = dit.denoise(x, t, dit.encode(passes(labels), 0))
        assert out.shape == frac.shape == x.shape
        raw = dit.network(x, timestep=t, class_labels=torch.tensor([0, 999, 1000, 17])).sample
        assert torch.equal(frac, (raw[:, 4:] + 1) / 2)
        for row, label in enumerate(labels):
            one = slice(row, row + 1)
            alone, alone_frac = dit.denoise(x[one], t[one], dit.encode(passes([label]), 0))
            close(out[one], alone, FORWARD)
            close(frac[one], alone_frac, FORWARD)


def test_the_null_class_is_the_last_and_labels_are_bounded(dit: DiT) -> None:
    assert dit.opposite(ClassLabel(3)) == ClassLabel(1000)
    assert dit.truncated(ClassLabel(3), 0) is None
    for wrong in (ClassLabel(1001), ClassLabel(-1), Prompt("cat")):
        with pytest.raises(InvalidValue):
            dit.encode(passes([wrong]), 0)


def test_it_is_square_at_the_trained_size(dit: DiT) -> None:
    assert dit.latent_shape(32, 32) == (4, 8, 8) and dit.image_tokens(32, 32) == 16
    limits = Limits(sizes=Sizes(min=32, max=64, multiple=32, square=True))
    with pytest.raises(CheckpointError, match=r"limits\.sizes.*32x32 only"):
        DiT(dit.card.model_copy(update={"limits": limits}), vars_of(dit), "cpu", torch.float32)


def test_without_variance_channels_there_is_no_frac(dit: DiT) -> None:
    card = dit.card.model_copy(update={"schedule": Schedule(kind="diffusion")})
    family = DiT(card, vars_of(dit), "cpu", torch.float32)
    with torch.inference_mode():
        out, frac = family.denoise(torch.zeros(1, 4, 8, 8), torch.zeros(1), family.encode(passes([ClassLabel(0)]), 0))
    assert out.shape == (1, 4, 8, 8) and frac is None and not family.learned_variance


def test_the_originals_arithmetic_where_the_card_says_so(checkpoints: Path, dit: DiT) -> None:
    original = load(checkpoints / "dit", time_freq_shift=0.0, norm_eps=1e-6)
    t = torch.tensor([500.25])
    frequencies = torch.exp(
        -math.log(10000) * torch.arange(128) / 128
    )  # facebookresearch/DiT models.py, timestep_embedding
    expected = torch.cat([torch.cos(t[:, None] * frequencies), torch.sin(t[:, None] * frequencies)], -1)
    for block in original.network.transformer_blocks:
        close(block.norm1.emb.time_proj(t), expected, FORWARD, furthest)
        assert block.norm3.eps == block.norm1.norm.eps == 1e-6
    apart(dit.network.transformer_blocks[0].norm1.emb.time_proj(t), expected, 1e-3, furthest)
    assert dit.network.transformer_blocks[0].norm3.eps == 1e-5
    x, label = (
        torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(2)),
        dit.encode(passes([ClassLabel(3)]), 0),
    )
    with torch.inference_mode():
        apart(original.denoise(x, t, label)[0], dit.denoise(x, t, label)[0], 1e-3)


def test_cards_with_another_arithmetic_cannot_share_the_network(dit: DiT) -> None:
    other = dit.card.model_copy(update={"norm_eps": 1e-6})
    assert DiT.traits(dit.card, "transformer") != DiT.traits(other, "transformer")
    assert DiT.traits(dit.card, "vae") == DiT.traits(other, "vae")


def test_networks_are_in_eval_mode(dit: DiT) -> None:
    parts = build(dit.card)
    assert not any(module.training for part in parts.values() for module in part.modules())
    assert not any(weight.requires_grad for part in parts.values() for weight in part.parameters())
