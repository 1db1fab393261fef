"""Rows with different adapters in one forward: counted, and each equal to itself alone."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.cards.card import Card
from app.cards.cards import read_cards
from app.pool.pool import Pool
from app.request import ImageSpec, Prompt, Request
from tests.parts.close import SAME, apart, close
from tests.parts.edits import edited
from tests.parts.engine import Bench, load_all
from tests.parts.loras import surveyed, write_lora
from tests.parts.requests import changed, flat

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

STEPS = 6
FILES: dict[str, dict[str, Any]] = {
    "blocks": {},
    "kohya": {"format": "kohya", "only": "^lora_", "alpha": 2.0},
    "clips": {"only": r"^transformer.*attn|^text_encoder", "ranks": (3, 8)},
}
ROWS: dict[str, tuple[tuple[str, float], ...]] = {
    "blocks": (("blocks", 0.8),),
    "kohya": (("kohya", -0.6),),
    "clips": (("clips", 1.1),),
    "two": (("blocks", 0.5), ("clips", 0.7)),
    "none": (),
}
"""Adapters with their weights, by the name of a row."""


@pytest.fixture(scope="module")
def cards(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Card]:
    folder = tmp_path_factory.mktemp("loras")
    for seed, (name, how) in enumerate(FILES.items()):
        write_lora(folder / f"{name}.safetensors", tiny / "tiny-sd3", seed=seed, **how)
    return surveyed(folder, {"tiny-sd3": read_cards(tiny)["tiny-sd3"]})


@pytest.fixture(scope="module")
def pool(cards: dict[str, Card]) -> Iterator[Pool]:
    """With all adapters on the device."""
    loaded = load_all(Pool(cards, "cpu", torch.float32))
    draw(loaded, [ask(name) for name in ROWS])
    yield loaded
    loaded.close()


def ask(name: str, **changes: Any) -> Request:
    """The request of a row: some are guided, samplers differ."""
    number = list(ROWS).index(name)
    sampler = ("flow_euler", "flow_dpmpp_2m")[number % 2]
    request = flat(
        name, "tiny-sd3", (ImageSpec(Prompt("a red apple", "dog"), 7),), 32, 32, sampler, STEPS, 4.0, 24,
        guided=name in ("blocks", "two", "none"), keep_latents=True,
    )  # fmt: skip
    return changed(request, adapters=ROWS[name], **changes)


def draw(pool: Pool, requests: list[Request], deterministic: bool = False) -> Bench:
    bench = Bench(pool, deterministic=deterministic)
    for request in requests:
        bench.engine.submit(request)
    bench.until(lambda: len(bench.results) == len(requests))
    return bench


def latents(bench: Bench) -> dict[str, np.ndarray]:
    return {name: one.latents for (name, _), one in bench.results.items() if one.latents is not None}


@pytest.mark.parametrize("deterministic", [False, True])
def test_three_adapters_two_at_once_and_none_share_every_forward(pool: Pool, deterministic: bool) -> None:
    together = draw(pool, [ask(name) for name in ROWS], deterministic)
    assert [tick.rows for tick in together.forwards] == [len(ROWS)] * STEPS
    assert {tick.passes for tick in together.forwards} == {8}
    mixed, alone = latents(together), {name: latents(draw(pool, [ask(name)], deterministic))[name] for name in ROWS}
    for name in ROWS:
        if deterministic:
            assert np.array_equal(mixed[name], alone[name]), name
        else:
            close(mixed[name], alone[name], SAME, of=name)


def test_each_draws_another_picture(pool: Pool) -> None:
    """The control: the same request with the adapters of another row, or with another weight, is far away."""
    for name in ROWS:
        own = latents(draw(pool, [ask(name)]))[name]
        for other in ROWS.keys() - {name}:
            apart(
                latents(draw(pool, [changed(ask(name), adapters=ROWS[other])]))[name], own, SAME, of=f"{name} {other}"
            )
    own = latents(draw(pool, [ask("two")]))["two"]
    apart(latents(draw(pool, [changed(ask("two"), adapters=(("blocks", 0.5), ("clips", 0.75)))]))["two"], own, SAME)


def test_rows_that_come_and_go_and_edits_are_bit_equal_to_each_alone(pool: Pool) -> None:
    """In deterministic mode: plain and masked edits, different numbers of steps, another row at every tick."""
    rows = []
    for number in range(20):
        name = list(ROWS)[number % len(ROWS)]
        row = changed(ask(name), id=f"{name}-{number}", steps=3 + number % 7)
        rows.append(edited(row, 0.6, number % 2 == 0, number) if number % 3 == 0 else row)
    bench = Bench(pool, deterministic=True)
    for row in rows:
        bench.engine.submit(row)
        bench.turn()
    bench.until(lambda: len(bench.results) == len(rows))
    assert max(tick.rows for tick in bench.forwards) >= 4
    mixed = latents(bench)
    for row in rows:
        assert np.array_equal(mixed[row.id], latents(draw(pool, [row], True))[row.id]), row.id


def test_forwards_without_adapters_run_the_network_as_it_is(pool: Pool) -> None:
    """After a forward with adapters no module has a forward of its own, so that the bits are those of a new server."""
    family = pool.family("tiny-sd3")
    assert family is not None
    for network in (family.network, *(one.network for one in family.encoders.values() if one)):
        assert [name for name, module in network.named_modules() if "forward" in vars(module)] == []


def test_a_prompt_is_encoded_once_for_each_adapter_and_weight(pool: Pool) -> None:
    """An adapter that does not change the text encoders finds what was encoded without any."""

    def misses(bench: Bench, adapters: tuple[tuple[str, float], ...]) -> int:
        before = len(bench.results)
        number = str(before)
        bench.engine.submit(changed(ask("none"), id=number, adapters=adapters))
        bench.reports.clear()
        bench.until(lambda: (number, 0) in bench.results)
        return sum(tick.text_misses for tick in bench.reports if hasattr(tick, "text_misses"))

    bench = Bench(pool)
    both = 2 * 3  # the prompt and the negative prompt, of three encoders
    assert misses(bench, ()) == both
    assert misses(bench, ()) == 0 and misses(bench, (("blocks", 0.8),)) == 0
    assert misses(bench, (("kohya", 0.8),)) == both and misses(bench, (("kohya", 0.8),)) == 0
    assert misses(bench, (("kohya", 0.9),)) == both and misses(bench, (("blocks", 0.8), ("kohya", 0.8))) == 0
