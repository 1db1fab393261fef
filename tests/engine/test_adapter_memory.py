"""Adapters in less memory than they take together, and files that turn out broken: every other request is answered."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from app.cards.card import Card
from app.cards.cards import read_cards
from app.errors import LoadError
from app.pool import memory
from app.pool.pool import Pool
from app.report import Evicted, Memory
from app.request import ImageSpec, Prompt, Request
from tests.parts.edits import edited
from tests.parts.engine import Bench, load_all
from tests.parts.loras import surveyed, write_lora
from tests.parts.requests import changed, flat

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("one_thread")]

MODEL, COUNT = "tiny-sd3", 12
NAMES = [f"style-{number:02}" for number in range(COUNT)]


def write(folder: Path, tiny: Path) -> Path:
    """Twelve files of about the same size, every third with a part for the text encoders."""
    for number, name in enumerate(NAMES):
        only = {"only": r"^(transformer.*attn|text_encoder)"} if number % 3 == 0 else {}
        write_lora(folder / f"{name}.safetensors", tiny / MODEL, seed=number, ranks=(8, 6), **only)
    return folder


@pytest.fixture(scope="module")
def loras(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write(tmp_path_factory.mktemp("loras"), tiny)


@pytest.fixture(scope="module")
def cards(tiny: Path, loras: Path) -> dict[str, Card]:
    return surveyed(loras, {MODEL: read_cards(tiny)[MODEL]})


@pytest.fixture(scope="module")
def alone(cards: dict[str, Card]) -> Iterator[Callable[[Request], np.ndarray]]:
    """What a request draws with nobody beside it and room for everything, in deterministic mode."""
    pool, known = load_all(Pool(cards, "cpu", torch.float32)), dict[str, np.ndarray]()

    def draw(request: Request) -> np.ndarray:
        if request.id not in known:
            bench = Bench(pool, deterministic=True)
            bench.engine.submit(request)
            bench.until(lambda: bench.results)
            known[request.id] = latents(bench, request)
        return known[request.id]

    yield draw
    pool.close()


@pytest.fixture
def opened(cards: dict[str, Card]) -> Iterator[Callable[..., Pool]]:
    pools: list[Pool] = []

    def open_pool(cards: dict[str, Card] = cards, **more: Any) -> Pool:
        pools.append(Pool(cards, "cpu", torch.float32, **more))
        return pools[-1]

    yield open_pool
    for pool in pools:
        pool.close()


def ask(number: int, **changes: Any) -> Request:
    """A request with one adapter, two, or every tenth with none; some are guided, some edits."""
    request = flat(
        f"r{number}", MODEL, (ImageSpec(Prompt(f"red {number % 4}", "dog"), number),), 32, 32,
        ("flow_euler", "flow_heun")[number % 2], 3 + number % 5, 4.0, 24, guided=number % 3 == 0, keep_latents=True,
    )  # fmt: skip
    names = (
        sorted({NAMES[number * 5 % COUNT], NAMES[number * 7 % COUNT]}) if number % 4 == 0 else [NAMES[number % COUNT]]
    )
    adapters = tuple((name, 0.85 - 0.3 * place - number % 7 / 10) for place, name in enumerate(names))
    request = changed(changed(request, adapters=() if number % 10 == 9 else adapters), **changes)
    return edited(request, 0.6, number % 2 == 0, number % 3) if number % 6 == 5 else request


def latents(bench: Bench, request: Request) -> np.ndarray:
    found = bench.results[request.id, 0].latents
    assert found is not None
    return found


@pytest.fixture(scope="module")
def room(cards: dict[str, Card]) -> Callable[[float], int]:
    """Bytes for the model and so many of the largest adapters."""
    pool = load_all(Pool(cards, "cpu", torch.float32))
    bench = Bench(pool)
    for number in range(COUNT):
        bench.engine.submit(changed(ask(number), id=str(number), adapters=((NAMES[number], 1.0),)))
    bench.until(lambda: len(bench.results) == COUNT)
    found = [one.bytes for one in pool.models[MODEL].adapters.values()]
    whole = pool.models[MODEL].bytes
    pool.close()
    assert len(found) == COUNT and 4 * min(found) > 3.1 * max(found), found
    return lambda adapters: int(whole + adapters * max(found))


@pytest.mark.parametrize("burst", [6, 60])
def test_sixty_mixed_requests_for_twelve_adapters_in_the_memory_of_three(
    opened: Callable[..., Pool], room: Callable[[float], int], alone: Callable[[Request], np.ndarray], burst: int
) -> None:
    """All are answered, each with the bits that it has alone; weights stay within the budget."""
    budget = room(3.1)
    bench, asked = Bench(opened(budget=budget), deterministic=True), [ask(number) for number in range(60)]
    for start in range(0, 60, burst):
        for request in asked[start : start + burst]:
            bench.engine.submit(request)
        bench.until(lambda end=start + burst: len(bench.results) == end)  # type: ignore[misc]
    assert not bench.failures
    for request in asked:
        assert np.array_equal(latents(bench, request), alone(request)), request.id
    told = [report.bytes["weights"] for report in bench.of(Memory)]
    assert told and max(told) <= budget
    evicted = bench.of(Evicted)
    assert len(evicted) >= 9, "at least those for which there is no room have left"
    assert max(tick.rows for tick in bench.forwards) >= 3


def test_more_adapters_than_there_is_room_for(
    opened: Callable[..., Pool], room: Callable[[float], int], alone: Callable[[Request], np.ndarray]
) -> None:
    """One of all twelve adapters does not fit, and its error says so; the others do not wait for it."""
    bench = Bench(opened(budget=room(3.1)), deterministic=True)
    large = changed(ask(1), id="large", adapters=tuple((name, 0.1) for name in NAMES))
    asked = [ask(number) for number in (1, 2, 3)]
    for request in (large, *asked):
        bench.engine.submit(request)
    answered(bench, 4)
    (error,) = [failure.error for failure in bench.failures.values()]
    assert isinstance(error, LoadError) and error.code == "insufficient_gpu_memory" and "large" in bench.failures
    for request in asked:
        assert np.array_equal(latents(bench, request), alone(request))


def answered(bench: Bench, count: int) -> None:
    """Turn until so many requests have a result or an error."""
    bench.until(lambda: len(bench.results) + len(bench.failures) >= count, failing=True)


def test_a_load_does_not_stop_the_step_loop(
    opened: Callable[..., Pool], alone: Callable[[Request], np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """While an adapter is being read, and as long as that takes, rows with others and with none go on to their end."""
    reading, gate, read = threading.Event(), threading.Event(), memory.read_adapter

    def slow(file: Path, *others: Any) -> Any:
        if file.stem == NAMES[2]:
            reading.set()
            assert gate.wait(60)
        return read(file, *others)

    bench = Bench(load_all(opened()), deterministic=True)
    warm = changed(ask(1), id="warm")
    bench.engine.submit(warm)
    bench.until(lambda: bench.results)
    monkeypatch.setattr(memory, "read_adapter", slow)
    waits, others = ask(2), [changed(ask(1), steps=40), changed(ask(9), steps=40)]
    for request in (waits, *others):
        bench.engine.submit(request)
    bench.until(reading.is_set)
    before = len(bench.forwards)
    later = changed(ask(19), id="later")
    bench.engine.submit(later)
    bench.until(lambda: len(bench.results) == 4)
    assert len(bench.forwards) - before >= 30 and not gate.is_set() and (waits.id, 0) not in bench.results
    gate.set()
    bench.until(lambda: len(bench.results) == 5)
    assert np.array_equal(latents(bench, waits), alone(waits))


def not_finite(file: Path) -> None:
    state = load_file(file)
    next(iter(state.values())).view(-1)[0] = float("nan")
    save_file(state, file, {"format": "pt"})


def cut(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:-100])


def narrower(file: Path) -> None:
    state = {name: value[:, :5].contiguous() for name, value in load_file(file).items()}
    save_file(state, file, {"format": "pt"})


@pytest.mark.parametrize("spoil", [not_finite, cut, narrower, Path.unlink, lambda file: file.write_bytes(b"")])
@pytest.mark.parametrize("evicted", [False, True])
def test_a_file_that_is_broken_when_it_is_read_is_one_error(
    tiny: Path,
    tmp_path: Path,
    opened: Callable[..., Pool],
    room: Callable[[float], int],
    alone: Callable[[Request], np.ndarray],
    spoil: Callable[[Path], None],
    evicted: bool,
) -> None:
    """Spoiled after the server has looked at it, before its first load or after an eviction. Others go on."""
    pool = opened(surveyed(write(tmp_path, tiny), {MODEL: read_cards(tiny)[MODEL]}), budget=room(2.3))
    bench = Bench(load_all(pool), deterministic=True)
    for number in (1, 2, 3) if evicted else ():
        bench.engine.submit(changed(ask(number), id="first"))
        bench.until(lambda: bench.results)
        bench.reports.clear()
    spoil(tmp_path / f"{NAMES[1]}.safetensors")
    good, bad = [ask(2), ask(9), ask(11)], [ask(1), ask(13), ask(4, adapters=((NAMES[1], 0.5), (NAMES[4], 0.5)))]
    for request in [good[0], *bad, *good[1:]]:
        bench.engine.submit(request)
    answered(bench, 6)
    bench.engine.submit(ask(25))
    answered(bench, 7)
    assert bench.failures.keys() == {*(request.id for request in bad), "r25"}
    for failure in bench.failures.values():
        assert isinstance(failure.error, LoadError) and failure.error.code == "lora_load_failed", failure
        assert NAMES[1] in failure.error.message and failure.error.param == f"loras.{NAMES[1]}"
    for request in good:
        assert np.array_equal(latents(bench, request), alone(request)), request.id
