"""Skip-layer guidance of SD3.5-medium, run by the engine beside other rows, against diffusers' pipeline."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import StableDiffusion3Pipeline

from app.cards.card import Card, SkipLayers
from app.cards.cards import read_card
from app.checkpoints.parts import build_family
from app.errors import CheckpointError
from app.pool.pool import Pool
from app.request import Prompt, Request, SkipGuidance
from tests.families.plain import ask, build, final, serve
from tests.parts.close import SAME, apart, close
from tests.parts.engine import load_all
from tests.parts.tiny import SD3_PARTS, write_sd3
from tests.parts.tiny_parts import write_json

PROMPT = Prompt("a red apple on a blue background", negative="green dog")
LAYERS = (1, 2)


@pytest.fixture(scope="module")
def card(tmp_path_factory: pytest.TempPathFactory) -> Card:
    """Five blocks, two of them with dual attention, like SD3.5-medium's."""
    folder = tmp_path_factory.mktemp("medium") / "medium"
    write_sd3(folder, name="medium", num_layers=5, qk_norm="rms_norm", dual_attention_layers=(0, 1))
    return read_card(folder / "card.toml").model_copy(update={"skip_layer_guidance": SkipLayers(layers=LAYERS)})


@pytest.fixture(scope="module")
def pool(card: Card) -> Iterator[Pool]:
    pool = load_all(Pool({"medium": card}, "cpu", torch.float32))
    yield pool
    pool.close()


@cache
def pipeline(folder: Path) -> Any:
    loaded = StableDiffusion3Pipeline.from_pretrained(folder)
    loaded.set_progress_bar_config(disable=True)
    return loaded


def upstream(card: Card, steps: int, size: tuple[int, int], skip: SkipGuidance | None) -> torch.Tensor:
    named = {}
    if skip:
        named = {f"skip_layer_guidance_{name}": getattr(skip, name) for name in ("scale", "start", "stop")}
    latents: torch.Tensor = pipeline(card.folder)(
        PROMPT.text, negative_prompt=PROMPT.negative, width=size[0], height=size[1], num_inference_steps=steps,
        guidance_scale=4.5, generator=torch.Generator().manual_seed(0), max_sequence_length=24, output_type="latent",
        skip_guidance_layers=list(LAYERS) if skip else None, **named,
    ).images  # fmt: skip
    return latents


def asked(name: str, steps: int, size: tuple[int, int], skip: SkipGuidance | None, **changes: Any) -> Request:
    options = {"sampler": "flow_euler", "steps": steps, "guidance": 4.5, "size": size, **changes}
    return ask("medium", PROMPT, name=name, skip=skip, **options)


CASES = [
    (28, (32, 32), SkipGuidance(2.8, 0.01, 0.2)),
    (10, (48, 32), SkipGuidance(2.8, 0.01, 0.2)),
    (10, (32, 32), SkipGuidance(5.0, 0.3, 1.0)),
    (4, (32, 32), SkipGuidance(2.8, 0.0, 0.5)),
    (12, (32, 32), None),
]


@pytest.mark.slow
def test_among_other_rows_it_is_the_pipelines(card: Card, pool: Pool) -> None:
    near = [
        ask("medium", Prompt("moon"), name=f"near-{number}", sampler=sampler, steps=steps, guidance=guidance)
        for number, (sampler, steps, guidance) in enumerate((("flow_heun", 9, 3.0), ("flow_euler", 30, 1.0)))
    ]
    requests = [asked(f"case-{number}", *case) for number, case in enumerate(CASES)]
    results = serve(pool, *near, *requests)[len(near) :]
    for result, case in zip(results, CASES, strict=True):
        close(final(result), upstream(card, *case), SAME)
    assert max(result.timings.shared for result in results) > 1


@pytest.mark.parametrize(
    "wrong",
    [None, SkipGuidance(2.6, 0.01, 0.2), SkipGuidance(2.8, 0.15, 0.2), SkipGuidance(2.8, 0.01, 0.35)],
)
def test_controls_are_told_from_the_pipeline(card: Card, pool: Pool, wrong: SkipGuidance | None) -> None:
    right = upstream(card, 10, (32, 32), SkipGuidance(2.8, 0.01, 0.2))
    (ours,) = serve(pool, asked("control", 10, (32, 32), wrong))
    apart(final(ours), right, SAME)


def test_an_unguided_row_has_none(pool: Pool) -> None:
    skip = SkipGuidance(2.8, 0.0, 1.0)
    requests = [asked(name, 4, (32, 32), each, guidance=1.0) for name, each in (("a", skip), ("b", None))]
    with_, without = serve(pool, *requests)
    assert with_.timings.shared == 2 and torch.equal(final(with_), final(without))


def test_another_card_may_share_the_network(card: Card, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The one that skips leaves nothing behind in it: the other's rows are what they were."""
    shared = {part: f"medium/{part}" for part in SD3_PARTS}
    folder = tmp_path_factory.mktemp("other")
    write_json(folder / "model_index.json", {})
    other = {"id": "other", "skip_layer_guidance": None, "components": shared, "folder": folder}
    pool = load_all(Pool({"medium": card, "other": card.model_copy(update=other)}, "cpu", torch.float32))
    plain = [
        ask("other", PROMPT, name=f"{i}", sampler="flow_euler", steps=3, guidance=g) for i, g in enumerate((4.0, 1))
    ]
    before = [final(result) for result in serve(pool, *plain)]
    serve(pool, asked("skips", 3, (32, 32), SkipGuidance(2.8, 0.0, 1.0)))
    after = [final(result) for result in serve(pool, *plain)]
    families = [pool.family(name) for name in ("medium", "other")]
    assert families[0].network is families[1].network  # type: ignore[union-attr]
    assert all(torch.equal(*pair) for pair in zip(before, after, strict=True))
    pool.close()


@pytest.mark.parametrize(("sampler", "steps", "lines"), [("flow_euler", 10, {1}), ("flow_heun", 10, {2, 3})])
def test_the_lines_that_take_a_third_pass(sampler: str, steps: int, lines: set[int]) -> None:
    request = asked("lines", steps, (32, 32), SkipGuidance(2.8, 0.01, 0.2), sampler=sampler)
    count = steps if sampler == "flow_euler" else 2 * steps - 1
    assert set(request.recipe.skipping(count)) == lines
    assert request.recipe.passes(count) == 2 * count + len(lines)


@pytest.mark.parametrize("layer", [4, 5])
def test_the_last_block_cannot_be_left_out(card: Card, layer: int) -> None:
    wrong = card.model_copy(update={"skip_layer_guidance": SkipLayers(layers=(layer,))})
    with pytest.raises(CheckpointError, match="skip_layer_guidance"):
        build_family(wrong, build(wrong), torch.device("cpu"), torch.float32)
