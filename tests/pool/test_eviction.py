"""Models in too little memory: parts come and go, leases hold, and what can never fit is refused with the numbers."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

import pytest
import torch

from app.cards.card import Card
from app.cards.cards import read_cards
from app.cards.folder import Part
from app.checkpoints.parts import part_states
from app.errors import CheckpointError
from app.pool.memory import Component
from app.pool.policy import PHASES, Parts
from app.pool.pool import Pool
from app.report import Evicted, ModelState
from app.request import Prompt
from tests.parts.requests import passes
from tests.parts.tiny import write_models
from tests.parts.waiting import eventually

ALL = ("tiny-dit", "tiny-sd3")


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Card]:
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return read_cards(folder)


@pytest.fixture(scope="module")
def sizes(cards: dict[str, Card]) -> dict[str, dict[str, int]]:
    """Bytes of each phase of the models in ALL, as the pool itself measures them without a budget."""
    pool = Pool(cards, "cpu", torch.float32)
    for model_id in ALL:
        ready(pool, model_id)
    models = pool.models
    found = {m: {p: sum(one.bytes for one in models[m].components((p,))) for p in PHASES} for m in ALL}
    pool.close()
    return found


@pytest.fixture
def made(cards: dict[str, Card]) -> Iterator[Callable[..., Pool]]:
    pools: list[Pool] = []

    def make(budget: int, **options: Any) -> Pool:
        pools.append(Pool(cards, "cpu", torch.float32, budget=budget, **options))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


class Counting:
    """Reads, and remembers the names of the folders."""

    folders: ClassVar[set[str]] = set()

    def __init__(self, real: Callable[[Part], Iterator[dict[str, torch.Tensor]]]) -> None:
        self._real = real
        self.folders.clear()

    def __call__(self, part: Part) -> Iterator[dict[str, torch.Tensor]]:
        self.folders.add(part.folder.name)
        return self._real(part)


def ready(pool: Pool, model_id: str) -> None:
    """Load the model; all of it where it fits."""
    pool.want(model_id)
    model = pool.models[model_id]
    eventually(lambda: model.state == "ready" and model.on_device == min(model.bytes, pool.policy.budget))


def held_now(pool: Pool) -> int:
    return sum(one.bytes for one in pool.policy.components if one.place == "device")


def test_the_one_that_was_leased_longest_ago_leaves(
    made: Callable[..., Pool], sizes: dict[str, dict[str, int]]
) -> None:
    both = sum(sum(sizes[model_id].values()) for model_id in ALL)
    pool = made(both - 1)
    ready(pool, "tiny-dit")
    ready(pool, "tiny-sd3")
    changes = pool.poll()
    evicted = [change for change in changes if isinstance(change, Evicted)]
    assert {change.model for change in evicted} >= {"tiny-dit"} and all(change.to == "away" for change in evicted)
    assert held_now(pool) <= both - 1
    assert pool.bytes == {"weights": held_now(pool), "parked": 0, "budget": both - 1}


def test_what_is_leased_is_never_evicted(made: Callable[..., Pool], sizes: dict[str, dict[str, int]]) -> None:
    largest = max(sum(size.values()) for size in sizes.values())
    pool = made(largest)
    ready(pool, "tiny-dit")
    leased = pool.components("tiny-dit", "denoise")
    assert pool.lease(leased)
    weight = pool.family("tiny-dit").network.pos_embed.proj.weight  # type: ignore[union-attr]
    pool.want("tiny-sd3")
    eventually(lambda: pool.family("tiny-sd3"))
    time.sleep(0.1)
    assert not pool.resident("tiny-sd3", "denoise") and not weight.is_meta
    assert pool.resident("tiny-dit", "denoise")
    pool.release(leased)
    eventually(lambda: pool.resident("tiny-sd3", "denoise"))
    assert not pool.resident("tiny-dit", "denoise")
    network = pool.family("tiny-dit").network  # type: ignore[union-attr]
    assert all(weight.is_meta for weight in network.parameters()), "its memory is given back"


def test_weights_that_come_back_are_the_same(made: Callable[..., Pool], sizes: dict[str, dict[str, int]]) -> None:
    pool = made(max(sum(size.values()) for size in sizes.values()))
    ready(pool, "tiny-sd3")
    family = pool.family("tiny-sd3")
    assert family is not None
    with torch.inference_mode():
        before = family.encode(passes([Prompt("red")]), 24)
        pixels = family.decode(torch.ones(1, *family.latent_shape(32, 32)))
    ready(pool, "tiny-dit")
    assert not pool.resident("tiny-sd3", "encode")
    ready(pool, "tiny-sd3")
    assert pool.family("tiny-sd3") is family
    with torch.inference_mode():
        after = family.encode(passes([Prompt("red")]), 24)
        assert torch.equal(pixels, family.decode(torch.ones(1, *family.latent_shape(32, 32))))
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_parts_that_fit_one_at_a_time(made: Callable[..., Pool], sizes: dict[str, dict[str, int]]) -> None:
    pool = made(max(sizes["tiny-sd3"].values()))
    ready(pool, "tiny-sd3")
    assert not pool.fits("tiny-sd3")
    for phase in ("encode", "denoise", "decode", "encode"):
        pool.need([], urgent=[("tiny-sd3", (phase,), ())])  # type: ignore[list-item]
        eventually(lambda phase=phase: pool.resident("tiny-sd3", phase))
        pool.need([])
    assert not pool.resident("tiny-sd3", "denoise")
    assert not [change for change in pool.poll() if isinstance(change, ModelState) and change.state == "absent"]


def test_a_phase_that_can_never_fit_is_refused_with_the_numbers(
    made: Callable[..., Pool], sizes: dict[str, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("app.pool.memory.part_states", lambda part: pytest.fail("not a byte moves"))
    pool = made(max(sizes["tiny-sd3"].values()) - 1)
    pool.want("tiny-sd3")
    eventually(lambda: pool.failure("tiny-sd3"))
    error = pool.failure("tiny-sd3")
    assert error.code == "insufficient_gpu_memory" and "INSTEP_DEVICE_MEMORY" in error.message
    assert error.message.count("MB") + error.message.count("KB") == 2


def test_needs_are_met_in_order_and_one_at_a_time(made: Callable[..., Pool], sizes: dict[str, dict[str, int]]) -> None:
    pool = made(max(sizes["tiny-sd3"].values()))
    ready(pool, "tiny-sd3")
    needs: list[Parts] = [("tiny-sd3", ("encode",), ()), ("tiny-sd3", ("decode",), ())]
    pool.need([], urgent=needs)
    eventually(lambda: pool.resident("tiny-sd3", "encode"))
    time.sleep(0.1)
    assert not pool.resident("tiny-sd3", "decode"), "who waited first must be able to lease what came"
    leased = pool.components("tiny-sd3", "encode")
    assert pool.lease(leased)
    pool.need([], urgent=needs[1:])
    eventually(lambda: pool.blocked)
    pool.release(leased)
    eventually(lambda: pool.resident("tiny-sd3", "decode"))
    assert not pool.blocked


def test_kept_models_are_spared_by_all_but_the_urgent(
    made: Callable[..., Pool], sizes: dict[str, dict[str, int]]
) -> None:
    pool = made(max(sum(size.values()) for size in sizes.values()))
    ready(pool, "tiny-dit")
    pool.need([("tiny-sd3", ("encode", "denoise", "decode"), ())], ["tiny-dit"])
    eventually(lambda: pool.blocked)
    assert pool.resident("tiny-dit", "denoise")
    pool.need([("tiny-sd3", ("encode", "denoise", "decode"), ())], [])
    eventually(lambda: pool.resident("tiny-sd3", "denoise"))


def test_unload_waits_for_leases_and_spares_what_others_use(made: Callable[..., Pool]) -> None:
    pool = made(10**9)
    for model_id in ("tiny-sd3", "tiny-sd3-turbo", "tiny-dit"):
        ready(pool, model_id)
    leased = pool.components("tiny-dit", "denoise")
    assert pool.lease(leased)
    pool.unload("tiny-dit")
    eventually(lambda: not pool.resident("tiny-dit", "decode"))
    assert pool.resident("tiny-dit", "denoise")
    pool.release(leased)
    eventually(lambda: pool.models["tiny-dit"].state == "absent")
    pool.unload("tiny-sd3-turbo")
    eventually(lambda: pool.models["tiny-sd3-turbo"].state == "absent")
    assert pool.resident("tiny-sd3", "encode") and pool.resident("tiny-sd3", "denoise")
    ready(pool, "tiny-dit")
    ready(pool, "tiny-sd3-turbo")


def test_files_that_change_while_a_model_is_away_fail_its_return(
    made: Callable[..., Pool], cards: dict[str, Card]
) -> None:
    pool = made(10**9)
    ready(pool, "tiny-sd3")
    pool.unload("tiny-sd3")
    eventually(lambda: not held_now(pool))
    (file,) = (cards["tiny-sd3"].folder / "transformer").glob("*.safetensors")
    whole = file.read_bytes()
    try:
        file.write_bytes(whole[:-1])
        pool.want("tiny-sd3")
        eventually(lambda: pool.failure("tiny-sd3"))
        assert isinstance(pool.failure("tiny-sd3"), CheckpointError) and not held_now(pool)
    finally:
        file.write_bytes(whole)
    ready(pool, "tiny-dit")


def test_models_that_share_parts_leave_nothing_behind_when_they_go_one_after_the_other(
    made: Callable[..., Pool],
) -> None:
    pool = made(10**9)
    for model_id in ("tiny-sd3", "tiny-sd3-turbo"):
        ready(pool, model_id)
    for model_id in ("tiny-sd3-turbo", "tiny-sd3"):
        pool.unload(model_id)
        eventually(lambda model_id=model_id: pool.models[model_id].state == "absent")
    eventually(lambda: not held_now(pool))


def test_rows_that_wait_for_a_model_which_is_unloaded_while_it_loads(
    made: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The next need brings it all the same."""
    pool = made(10**9)
    needs: list[Parts] = [("tiny-dit", ("encode", "denoise", "decode"), ())]
    with pool.lock:
        pool.want("tiny-dit")
        pool.need(needs, ())
        pool.unload("tiny-dit")
    pool.need(needs)
    eventually(lambda: pool.resident("tiny-dit", "denoise"))


def test_the_loader_outlives_a_drop_that_raises(made: Callable[..., Pool], monkeypatch: pytest.MonkeyPatch) -> None:
    pool = made(10**9)
    ready(pool, "tiny-dit")
    leave, left = Component.leave, []

    def fail_once(one: Component) -> None:
        left.append(one)
        if len(left) == 1:
            raise RuntimeError("no")
        leave(one)

    with monkeypatch.context() as patch:
        patch.setattr(Component, "leave", fail_once)
        pool.unload("tiny-dit")
        eventually(lambda: bool(left))
    ready(pool, "tiny-sd3")
    ready(pool, "tiny-dit")


def test_weights_put_aside_come_back_the_same(
    made: Callable[..., Pool], sizes: dict[str, dict[str, int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Host memory, played on the CPU: the moves are real, and the two tiers are the same memory."""
    budget = max(sum(size.values()) for size in sizes.values())
    pool = made(budget)
    pool.policy.host = 10**9
    ready(pool, "tiny-sd3")
    family: Any = pool.family("tiny-sd3")
    assert family.t5[0].shared is family.t5[0].encoder.embed_tokens
    with torch.inference_mode():
        before = family.encode(passes([Prompt("red")]), 24)
    monkeypatch.setattr("app.pool.memory.part_states", Counting(part_states))
    ready(pool, "tiny-dit")
    assert pool.policy.parked and not pool.resident("tiny-sd3", "encode")
    ready(pool, "tiny-sd3")
    with torch.inference_mode():
        after = family.encode(passes([Prompt("red")]), 24)
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert Counting.folders == {"transformer", "vae"}, "only the other model was read from its files"
    evicted = [change for change in pool.poll() if isinstance(change, Evicted)]
    assert evicted and all(change.to == "host" for change in evicted)
