"""SD3, run by the engine, against diffusers' StableDiffusion3Pipeline on the same files; and itself in batches."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from app.errors import CheckpointError, InvalidValue
from app.families import SD3
from app.pool.pool import Pool
from app.request import ClassLabel, Prompt
from tests.families.plain import ask, final, load, serve
from tests.parts.close import FORWARD, LEVELS, SAME, apart, beyond_rounding, close
from tests.parts.requests import passes

PROMPT = Prompt("a red apple on a blue background", negative="green dog")


@cache
def pipeline(folder: Path) -> Any:
    absent = {"text_encoder_3": None, "tokenizer_3": None} if folder.name == "no-t5" else {}
    loaded = StableDiffusion3Pipeline.from_pretrained(folder, **absent)
    loaded.set_progress_bar_config(disable=True)
    return loaded


@cache
def upstream(
    folder: Path, prompt: Prompt, *, size: tuple[int, int], steps: int, guidance: float, **options: Any
) -> Any:
    return pipeline(folder)(
        prompt.text,
        negative_prompt=prompt.negative,
        width=size[0],
        height=size[1],
        num_inference_steps=steps,
        guidance_scale=guidance,
        generator=torch.Generator().manual_seed(options.get("seed", 0)),
        max_sequence_length=options.get("text_length", 24),
        output_type=options.get("output_type", "latent"),
    ).images


CASES: list[tuple[str, dict[str, Any]]] = [
    ("sd3", {"size": (32, 32), "steps": 6, "guidance": 4.0}),
    ("sd3", {"size": (64, 16), "steps": 28, "guidance": 7.0, "seed": 3}),
    ("sd3", {"size": (32, 48), "steps": 4, "guidance": 0.0}),
    ("sd3", {"size": (48, 32), "steps": 5, "guidance": 4.0, "text_length": 40}),
    ("sd35", {"size": (16, 48), "steps": 10, "guidance": 3.5, "seed": 2**31}),
    ("sd35", {"size": (64, 64), "steps": 1, "guidance": 1.0}),
    ("no-t5", {"size": (48, 16), "steps": 8, "guidance": 5.0}),
]


@pytest.mark.parametrize(("name", "options"), CASES)
def test_latents_are_those_of_the_pipeline(checkpoints: Path, pool: Pool, name: str, options: dict[str, Any]) -> None:
    (ours,) = serve(pool, ask(name, PROMPT, sampler="flow_euler", **options))
    close(final(ours), upstream(checkpoints / name, PROMPT, **options), SAME)


def test_in_mixed_traffic_too(checkpoints: Path, pool: Pool) -> None:
    """Every case at once, among rows of its model and size with other prompts, samplers, steps and guidance."""
    others = (("flow_heun", 3, 1.0), ("flow_dpmpp_2m", 9, 6.0), ("flow_euler", 30, 2.0))
    asked, near = [], []
    for case, (name, options) in enumerate(CASES):
        asked.append(ask(name, PROMPT, sampler="flow_euler", name=f"case-{case}", **options))
        for number, (sampler, steps, guidance) in enumerate(others):
            other = {**options, "steps": steps, "guidance": guidance, "seed": number}
            near.append(ask(name, Prompt("moon"), sampler=sampler, name=f"near-{case}-{number}", **other))
    results = serve(pool, *near, *asked)[len(near) :]
    for result, (name, options) in zip(results, CASES, strict=True):
        assert result.timings.shared > 1, "it shared no forward"
        close(final(result), upstream(checkpoints / name, PROMPT, **options), SAME)


def test_the_image_is_that_of_the_pipeline(checkpoints: Path, pool: Pool) -> None:
    options: dict[str, Any] = {"size": (32, 16), "steps": 6, "guidance": 4.0, "seed": 12}
    image = 255.0 * upstream(checkpoints / "sd3", PROMPT, **options, output_type="np")[0]
    (ours,) = serve(pool, ask("sd3", PROMPT, sampler="flow_euler", **options))
    close(ours.pixels, image, LEVELS, beyond_rounding)
    apart(ours.pixels[::-1], image, LEVELS, beyond_rounding)


@pytest.mark.parametrize(
    "wrong",
    [
        {"steps": 5},
        {"steps": 7},
        {"guidance": 3.9},
        {"guidance": 4.1},
        {"model": "unshifted"},
        {"model": "swapped"},
        {"model": "dropped"},
    ],
    ids=str,
)
def test_controls_are_told_from_the_pipeline(checkpoints: Path, pool: Pool, wrong: dict[str, Any]) -> None:
    theirs = upstream(checkpoints / "sd3", PROMPT, size=(32, 32), steps=6, guidance=4.0)
    options = {"model": "sd3", "steps": 6, "guidance": 4.0, "sampler": "flow_euler", **wrong}
    (ours,) = serve(pool, ask(condition=PROMPT, **options))
    apart(final(ours), theirs, 1e-3)


def test_a_row_in_a_mixed_batch_is_the_row_alone(sd3: SD3) -> None:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn((5, *sd3.latent_shape(48, 32)), generator=generator)
    t = torch.tensor([999.0, 3.25, 500.0, 857.14, 120.0])
    prompts = [Prompt(text) for text in ("red apple", "", "a cat and a dog", "red apple", "moon")]
    with torch.inference_mode():
        together, _ = sd3.denoise(x, t, sd3.encode(passes(prompts), 24))
        for row, prompt in enumerate(prompts):
            alone, frac = sd3.denoise(x[row : row + 1], t[row : row + 1], sd3.encode(passes([prompt]), 24))
            assert frac is None
            close(together[row : row + 1], alone, FORWARD)


@pytest.mark.parametrize("batch", [None, 1, 2, 8])
def test_prompts_encoded_together_are_those_encoded_alone(sd3: SD3, batch: int | None) -> None:
    texts = ["red apple", "", "moon and stars", "red apple", "a cat"]
    sizes: list[int] = []
    hook = sd3.t5[0].register_forward_pre_hook(lambda module, inputs: sizes.append(len(inputs[0])))
    with torch.inference_mode():
        together = sd3.encode(passes([Prompt(text) for text in texts]), 24, batch)
        hook.remove()
        for row, text in enumerate(texts):
            for name, value in sd3.encode(passes([Prompt(text)]), 24).items():
                close(together[name][row : row + 1], value, FORWARD)
    assert sizes == {None: [4], 1: [1] * 4, 2: [2, 2], 8: [8]}[batch]


def test_decode_gives_the_pipelines_image(checkpoints: Path, sd3: SD3) -> None:
    latents = upstream(checkpoints / "sd3", PROMPT, size=(48, 32), steps=6, guidance=4.0)
    theirs = upstream(checkpoints / "sd3", PROMPT, size=(48, 32), steps=6, guidance=4.0, output_type="np")
    with torch.inference_mode():
        ours = sd3.decode(latents.expand(2, -1, -1, -1))
    assert ours.shape == (2, 32, 48, 3) and ours.dtype == torch.uint8
    close(ours[1], 255.0 * theirs[0], LEVELS, beyond_rounding)


@pytest.mark.parametrize("absent", ["text_encoder", "text_encoder_2"])
def test_an_absent_clip_is_zeros_in_its_share(sd3: SD3, parts: dict[str, Any], absent: str) -> None:
    left = {name: part for name, part in parts.items() if name not in (absent, absent.replace("text_encoder", "token"))}
    family = SD3(sd3.card, left, "cpu", torch.float32)
    gone, kept = (slice(0, 16), slice(16, 40)) if absent == "text_encoder" else (slice(16, 40), slice(0, 16))
    with torch.inference_mode():
        part, whole = family.encode(passes([PROMPT]), 24), sd3.encode(passes([PROMPT]), 24)
    for ours, full in ((part["text"][:, :24], whole["text"][:, :24]), (part["pooled"], whole["pooled"])):
        assert not ours[..., gone].any() and full[..., gone].any()
        assert torch.equal(ours[..., kept], full[..., kept])
    assert torch.equal(part["text"][:, 24:], whole["text"][:, 24:])


def test_without_any_encoder_the_text_is_zeros(sd3: SD3, parts: dict[str, Any]) -> None:
    left = {name: part for name, part in parts.items() if name in ("transformer", "vae")}
    encoded = SD3(sd3.card, left, "cpu", torch.float32).encode(passes([PROMPT, Prompt("x")]), 30)
    assert encoded["text"].shape == (2, 54, 48) and not encoded["text"].any() and not encoded["pooled"].any()


def test_the_text_that_no_encoder_sees_is_told(checkpoints: Path, sd3: SD3) -> None:
    long = Prompt("a red Cat and the " * 5 + "End.")
    assert sd3.truncated(Prompt("red apple"), 24) is None
    # Of the CLIPs' 24 tokens 22 are words; the T5 spells out "Cat", but has room for all.
    assert sd3.truncated(long, 23) == "Cat and the End."
    assert sd3.truncated(long, 60) is None
    assert load(checkpoints / "no-t5").truncated(long, 40) == "Cat and the End."


def test_shapes_opposites_and_labels(sd3: SD3) -> None:
    assert sd3.latent_shape(48, 32) == (4, 8, 12) and sd3.image_tokens(48, 32) == 24
    assert sd3.opposite(PROMPT) == Prompt("green dog") and not sd3.learned_variance
    with pytest.raises(InvalidValue):
        sd3.encode(passes([ClassLabel(1)]), 24)


def test_parts_that_do_not_fit_are_refused(sd3: SD3, parts: dict[str, Any]) -> None:
    for wrong in ({"text_encoder_2": parts["text_encoder"]}, {"tokenizer_3": None}):
        with pytest.raises(CheckpointError):
            SD3(sd3.card, {**parts, **wrong}, "cpu", torch.float32)
    sizes = sd3.card.limits.sizes.model_copy(update={"max": 112})
    card = sd3.card.model_copy(update={"limits": sd3.card.limits.model_copy(update={"sizes": sizes})})
    with pytest.raises(CheckpointError, match=r"card\.toml: limits\.sizes\.max"):
        SD3(card, parts, "cpu", torch.float32)
