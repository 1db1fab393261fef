"""Adapters in the engine: rows with different ones share forwards, and the pool brings those that rows wait for."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from app.cards.adapters import Adapter
from app.cards.card import Card
from app.cards.cards import read_cards
from app.pool.pool import RETRY_AFTER, Pool
from app.report import Evicted
from app.request import ImageSpec, Prompt, Request
from tests.parts.engine import Bench, load_all
from tests.parts.requests import flat
from tests.parts.waiting import Clock, eventually

MODEL, RANK, TWELVE = "tiny-sd3", 4, [f"adapter-{number:02}" for number in range(12)]
Uses = tuple[tuple[str, float], ...]


@pytest.fixture(scope="module")
def networks(tiny: Path) -> Iterator[dict[str, nn.Module]]:
    pool = load_all(Pool({MODEL: read_cards(tiny)[MODEL]}, "cpu", torch.float32))
    parts = pool.models[MODEL].parts
    yield {name: one.value for name, one in parts.items() if isinstance(one.value, nn.Module) and name != "vae"}
    pool.close()


def written(file: Path, networks: dict[str, nn.Module], seed: int) -> Adapter:
    """An adapter for every linear layer of a model's blocks and of its text encoders."""
    dice, state = torch.Generator().manual_seed(seed), {}
    for part, network in networks.items():
        for name, one in network.named_modules():
            if isinstance(one, nn.Linear) and "relative" not in name and "." in name:
                state[f"{part}.{name}.lora_A.weight"] = torch.randn(RANK, one.in_features, generator=dice) * 0.2
                state[f"{part}.{name}.lora_B.weight"] = torch.randn(one.out_features, RANK, generator=dice) * 0.2
    save_file(state, file)
    return Adapter(name=file.stem, file=file, stamp=(seed,))


@pytest.fixture
def card(tiny: Path, tmp_path: Path, networks: dict[str, nn.Module]) -> Card:
    made = [written(tmp_path / f"{name}.safetensors", networks, seed) for seed, name in enumerate(TWELVE)]
    return read_cards(tiny)[MODEL].model_copy(update={"adapters": {one.name: one for one in made}})


@pytest.fixture
def pools() -> Iterator[list[Pool]]:
    made: list[Pool] = []
    yield made
    for pool in made:
        pool.close()


def ask(name: str, uses: Uses = (), number: int = 1, steps: int = 5) -> Request:
    return flat(
        id=name, model=MODEL, images=(ImageSpec(Prompt(f"red {number}"), number),), width=32, height=32,
        sampler="flow_euler", steps=steps, guided=number % 2 == 1, guidance=4.0, text_length=24, keep_latents=True,
        adapters=uses,
    )  # fmt: skip


A, B, C = ((name, 0.8) for name in TWELVE[:3])
MIX: dict[str, Uses] = {
    "none": (), "one": (A,), "same": ((A[0], -0.5),), "another": (B,), "third": (C,), "two": (A, B), "others": (B, C),
}  # fmt: skip


def names(bench: Bench) -> set[str]:
    return {name for name, _ in bench.results}


def latents(bench: Bench) -> dict[str, np.ndarray]:
    found = {name: one.latents for (name, _), one in bench.results.items() if one.latents is not None}
    assert not bench.failures, bench.failures
    return found


def answered(pool: Pool, asked: list[Request], deterministic: bool = False) -> Bench:
    bench = Bench(pool, deterministic=deterministic)
    for one in asked:
        bench.engine.submit(one)
    bench.until(lambda: len(bench.results) == len(asked))
    return bench


@pytest.mark.parametrize("deterministic", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_rows_of_three_adapters_of_two_at_once_and_of_none_share_forwards(
    card: Card, pools: list[Pool], deterministic: bool
) -> None:
    pools.append(load_all(Pool({MODEL: card}, "cpu", torch.float32)))
    asked = [ask(name, uses, number) for number, (name, uses) in enumerate(MIX.items())]
    answered(pools[0], asked)  # so that all adapters are here
    together = answered(pools[0], asked, deterministic)
    if not deterministic:  # else eight passes are a forward
        assert [tick.rows for tick in together.forwards] == [len(MIX)] * 5
    for one in asked:
        alone, mixed = latents(answered(pools[0], [one], deterministic))[one.id], latents(together)[one.id]
        if deterministic:
            assert np.array_equal(alone, mixed), one.id
        else:
            assert np.abs(alone - mixed).max() < 1e-4, one.id
    plain = latents(answered(pools[0], [ask("plain", (), 1)]))["plain"]
    assert np.abs(plain - latents(together)["one"]).max() > 0.05


@pytest.mark.slow
def test_twelve_adapters_in_the_memory_of_three(card: Card, pools: list[Pool]) -> None:
    """All are answered as with room for all; only adapters leave, and the model's own rows go on meanwhile."""
    asked = [ask(f"{n}", ((TWELVE[n * 7 % 12], 0.7),) if n % 5 else (), n, steps=2 + n % 6) for n in range(60)]
    pools.append(load_all(Pool({MODEL: card}, "cpu", torch.float32)))
    expected = latents(answered(pools[0], asked))
    size = pools[0].models[MODEL].adapters[TWELVE[0]].bytes
    budget = pools[0].size(MODEL) + int(3.5 * size)
    pools.append(load_all(Pool({MODEL: card}, "cpu", torch.float32, budget=budget)))
    bench = answered(pools[1], asked)
    found = latents(bench)
    assert max(np.abs(found[name] - expected[name]).max() for name in expected) < 1e-4
    gone = [one for one in bench.reports if isinstance(one, Evicted)]
    assert {one.part for one in gone} == {"lora"} and len(gone) >= 9
    assert pools[1].bytes["weights"] <= budget


def test_an_adapter_that_cannot_be_read_fails_alone_and_is_tried_again(card: Card, pools: list[Pool]) -> None:
    clock, file = Clock(), card.adapters[B[0]].file
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    pools.append(load_all(Pool({MODEL: card}, "cpu", torch.float32, clock=clock)))
    bench = Bench(pools[0])
    for name, uses in MIX.items():
        bench.engine.submit(ask(name, uses))
    broken = {name for name, uses in MIX.items() if B in uses}
    good = MIX.keys() - broken
    bench.until(lambda: (names(bench), bench.failures.keys()) == (good, broken), failing=True)
    assert all(str(file) in failure.error.message for failure in bench.failures.values())
    file.write_bytes(whole)
    again = Bench(pools[0]).run([ask("too early", (B,))])
    assert again.failures and not again.results
    clock.now += RETRY_AFTER
    assert answered(pools[0], [ask("later", (B,))]).results


def test_more_adapters_than_fit_are_an_error_of_their_request(card: Card, pools: list[Pool]) -> None:
    pools.append(load_all(Pool({MODEL: card}, "cpu", torch.float32)))
    answered(pools[0], [ask("one", (A,))])
    model = pools[0].models[MODEL]
    largest = max(sum(one.bytes for one in model.components((phase,))) for phase in ("encode", "denoise"))
    pools.append(Pool({MODEL: card}, "cpu", torch.float32, budget=largest + int(1.5 * model.adapters[A[0]].bytes)))
    bench = Bench(pools[1])
    for name, uses in MIX.items():
        bench.engine.submit(ask(name, uses))
    both = {name for name, uses in MIX.items() if len(uses) > 1}
    bench.until(lambda: len(bench.results) + len(bench.failures) == len(MIX), failing=True)
    assert bench.failures.keys() == both
    assert all(failure.error.code == "insufficient_gpu_memory" for failure in bench.failures.values())


def test_a_changed_file_is_read_anew_after_a_reload(
    card: Card, pools: list[Pool], networks: dict[str, nn.Module]
) -> None:
    pools.append(load_all(Pool({MODEL: card}, "cpu", torch.float32)))
    before = latents(answered(pools[0], [ask("one", (A,))]))["one"]
    changed = written(card.adapters[A[0]].file, networks, 99)
    assert np.array_equal(latents(answered(pools[0], [ask("one", (A,))]))["one"], before)
    again = card.model_copy(update={"adapters": {**card.adapters, changed.name: changed}})
    bench = Bench(pools[0])
    bench.engine.reload({MODEL: again}, "info")
    bench.engine.submit(ask("one", (A,)))
    bench.until(lambda: bench.results)
    assert np.abs(latents(bench)["one"] - before).max() > 0.01


def test_a_leased_adapter_that_a_reload_replaces_is_freed_after_its_rows(
    card: Card, pools: list[Pool], networks: dict[str, nn.Module]
) -> None:
    pools.append(load_all(Pool({MODEL: card}, "cpu", torch.float32)))
    bench = Bench(pools[0])
    bench.engine.submit(ask("one", (A,), steps=20))
    bench.until(lambda: bench.forwards)
    changed = written(card.adapters[A[0]].file, networks, 99)
    again = card.model_copy(update={"adapters": {**card.adapters, changed.name: changed}})
    bench.engine.reload({MODEL: again}, "info")
    bench.until(lambda: bench.results)
    assert pools[0].bytes["weights"] == pools[0].size(MODEL)


def test_nothing_but_the_pool_has_the_weights_of_an_adapter_after_the_last_line(card: Card, pools: list[Pool]) -> None:
    """They are freed by their count of references alone, before the image is decoded."""
    pools.append(load_all(Pool({MODEL: card}, "cpu", torch.float32)))
    bench = Bench(pools[0])
    bench.engine.submit(ask("one", (A,)))
    gc.disable()
    try:
        bench.until(lambda: bench.engine.batcher.finished)
        weights = weakref.ref(next(pools[0].adapter(MODEL, A[0]).parameters()))
        assert weights() is not None
        pools[0].unload(MODEL)
        eventually(lambda: not pools[0].bytes["weights"], 10)
        assert weights() is None
    finally:
        gc.enable()


def test_an_adapter_is_built_and_brought_for_one_need(card: Card, pools: list[Pool]) -> None:
    """An idle engine asks ten times a second."""
    pools.append(load_all(Pool({MODEL: card}, "cpu", torch.float32)))
    pools[0].need([(MODEL, ("encode", "denoise"), (A[0],))])
    eventually(lambda: pools[0].resident(MODEL, "denoise", (A[0],)), 10)


def test_a_reload_tries_a_broken_adapter_at_once(card: Card, pools: list[Pool]) -> None:
    file = card.adapters[A[0]].file
    whole = file.read_bytes()
    file.write_bytes(whole[:-8])
    pools.append(load_all(Pool({MODEL: card}, "cpu", torch.float32)))
    bench = Bench(pools[0])
    bench.engine.submit(ask("broken", (A,)))
    bench.until(lambda: bench.failures, failing=True)
    bench.turn()  # it asks for nothing any more
    file.write_bytes(whole)
    mended = card.adapters[A[0]].model_copy(update={"stamp": (99,)})
    later = Bench(pools[0])
    later.engine.reload({MODEL: card.model_copy(update={"adapters": {**card.adapters, A[0]: mended}})}, "info")
    later.engine.submit(ask("mended", (A,)))
    later.until(lambda: later.results)
