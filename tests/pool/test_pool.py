"""Pool: models load in the background, share what they name, are leased, and fail with a reason."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from app.cards.card import Card
from app.cards.cards import read_cards
from app.cards.folder import Part
from app.errors import CheckpointError, ModelNotFound
from app.families.base import Family
from app.pool import memory
from app.pool.pool import RETRY_AFTER, Pool
from app.report import ModelState
from app.request import ClassLabel
from tests.parts.requests import passes
from tests.parts.waiting import Clock, eventually


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
def cards(tiny: Path) -> dict[str, Card]:
    return read_cards(tiny)


@pytest.fixture
def pool(cards: dict[str, Card], clock: Clock) -> Iterator[Pool]:
    pool = Pool(cards, "cpu", torch.float32, clock=clock)
    yield pool
    pool.close()


def states_until(pool: Pool, model_id: str, state: str) -> list[ModelState]:
    """All changes of state up to and including the one awaited."""
    seen: list[ModelState] = []

    def there() -> bool:
        seen.extend(change for change in pool.poll() if isinstance(change, ModelState))
        return any(one.model == model_id and one.state == state for one in seen)

    eventually(there)
    return seen


def load(pool: Pool, *model_ids: str) -> list[Family]:
    for model_id in model_ids:
        pool.want(model_id)
        states_until(pool, model_id, "ready")
    families = [pool.family(model_id) for model_id in model_ids]
    return [family for family in families if family]


class Gate:
    """Holds every read of weights until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.reached, self.opened, self.reads = threading.Event(), threading.Event(), [Path()]
        real = memory.part_states

        def read(part: Part) -> Any:
            self.reads.append(part.folder)
            self.reached.set()
            assert self.opened.wait(60)
            return real(part)

        monkeypatch.setattr(memory, "part_states", read)


def test_a_load_is_told_step_by_step(pool: Pool) -> None:
    assert not pool.resident("tiny-dit", "denoise") and pool.failure("tiny-dit") is None and pool.poll() == []
    pool.want("tiny-dit")
    loading, ready = states_until(pool, "tiny-dit", "ready")
    assert (loading.state, ready.state) == ("loading", "ready") and ready.seconds > 0
    assert pool.resident("tiny-dit", "denoise") and pool.lease(pool.components("tiny-dit", "denoise"))
    network = pool.family("tiny-dit").network  # type: ignore[union-attr]
    assert ready.device_bytes > 4 * sum(weight.numel() for weight in network.parameters())
    changes = pool.poll()
    pool.want("tiny-dit")
    assert pool.poll() == [] and not [change for change in changes if isinstance(change, ModelState)]


def test_other_models_keep_stepping_while_one_loads(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    (dit,) = load(pool, "tiny-dit")
    gate = Gate(monkeypatch)
    pool.want("tiny-sd3")
    assert gate.reached.wait(60)
    with torch.inference_mode():
        out, _ = dit.denoise(torch.zeros(1, 4, 8, 8), torch.zeros(1), dit.encode(passes([ClassLabel(0)]), 0))
    assert torch.isfinite(out).all() and not pool.resident("tiny-sd3", "denoise")
    assert [change.state for change in pool.poll() if isinstance(change, ModelState)] == ["loading"]
    gate.opened.set()
    states_until(pool, "tiny-sd3", "ready")
    assert pool.lease(pool.components("tiny-sd3", "denoise"))


def test_fifty_wants_are_one_load(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    gate.opened.set()
    for _ in range(50):
        pool.want("tiny-dit")
    states = states_until(pool, "tiny-dit", "ready")
    assert [state.state for state in states] == ["loading", "ready"] and len(gate.reads) == 1 + 2


def test_a_component_that_two_cards_name_is_one_object(pool: Pool) -> None:
    whole, turbo, without = load(pool, "tiny-sd3", "tiny-sd3-turbo", "tiny-sd3-no-t5")
    for name in ("network", "vae"):
        assert getattr(whole, name) is getattr(turbo, name) is getattr(without, name)
    assert whole.clips[1][0] is without.clips[1][0] and whole.t5[0] is turbo.t5[0]  # type: ignore[attr-defined]
    assert without.t5 is None and turbo.card.defaults.num_inference_steps == 4  # type: ignore[attr-defined]


def test_a_link_to_the_same_folder_is_the_same_component(cards: dict[str, Card], tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text((cards["tiny-dit"].folder / "model_index.json").read_text())
    for part in ("transformer", "vae"):
        (tmp_path / part).symlink_to(cards["tiny-dit"].folder / part)
    linked = cards["tiny-dit"].model_copy(update={"id": "linked", "folder": tmp_path})
    other = cards["tiny-dit"].model_copy(update={"id": "other", "norm_eps": 1e-6})
    pool = Pool({"tiny-dit": cards["tiny-dit"], "linked": linked, "other": other}, "cpu", torch.float32)
    first, second, third = load(pool, "tiny-dit", "linked", "other")
    pool.close()
    assert first.network is second.network and first.vae is second.vae is third.vae  # type: ignore[attr-defined]
    assert first.network is not third.network  # type: ignore[attr-defined]  # another arithmetic on the same weights


def test_leases_count_on_the_components_of_their_phase(pool: Pool) -> None:
    load(pool, "tiny-sd3", "tiny-sd3-no-t5")
    held = {one.part.name: one for one in pool.policy.components}
    leases = [pool.components(model_id, "encode", "denoise") for model_id in ("tiny-sd3", "tiny-sd3-no-t5")]
    assert all(pool.lease(components) for components in leases)
    counts = {name: one.leases for name, one in held.items()}
    assert counts["text_encoder"] == counts["transformer"] == 2 and counts["text_encoder_3"] == 1 and not counts["vae"]
    for components in leases:
        pool.release(components)
    assert not any(one.leases for one in held.values())


def test_a_failed_load_is_not_tried_again_for_thirty_seconds(
    pool: Pool, clock: Clock, cards: dict[str, Card], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = cards["tiny-dit"].folder / "vae" / "config.json"
    whole = file.read_text()
    file.write_text("{")
    pool.want("tiny-dit")
    *_, failed = states_until(pool, "tiny-dit", "failed")
    file.write_text(whole)
    error = pool.failure("tiny-dit")
    assert isinstance(error, CheckpointError) and str(file) in failed.detail == error.message
    assert error.__traceback__ is None and not pool.policy.components, "what was loaded before it failed is let go"
    clock.now = RETRY_AFTER - 0.1
    pool.want("tiny-dit")
    assert pool.poll() == [] and pool.failure("tiny-dit") is error and not pool.resident("tiny-dit", "denoise")
    clock.now = RETRY_AFTER
    pool.want("tiny-dit")
    assert pool.failure("tiny-dit") is None
    assert [state.state for state in states_until(pool, "tiny-dit", "ready")] == ["loading", "ready"]


def test_the_pool_survives_what_nobody_foresaw(pool: Pool, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = iter([RuntimeError("secret"), torch.OutOfMemoryError("secret")])

    def broken(part: Part) -> Any:
        raise next(errors)

    with monkeypatch.context() as patch:
        patch.setattr(memory, "part_states", broken)
        for model_id in ("tiny-dit", "tiny-sd3"):
            pool.want(model_id)
            states_until(pool, model_id, "failed")
    unforeseen, full = pool.failure("tiny-dit"), pool.failure("tiny-sd3")
    assert unforeseen is not None and "RuntimeError" in unforeseen.message and "secret" not in unforeseen.message
    assert full is not None and "not enough memory" in full.message
    load(pool, "tiny-sd3-turbo")


@pytest.mark.parametrize("lost", [True, False], ids=["device", "loader"])
def test_who_polls_hears_that_the_loader_ended(pool: Pool, monkeypatch: pytest.MonkeyPatch, lost: bool) -> None:
    """A lost device, or what nobody foresaw while a failed load was cleared away: no load would ever end."""
    error = torch.AcceleratorError("CUDA error: an illegal memory access") if lost else RuntimeError("no room")

    def broken(*_: object) -> Any:
        raise error

    monkeypatch.setattr(memory, "part_states", broken)
    if not lost:
        monkeypatch.setattr(pool, "drop", broken)
    pool.want("tiny-dit")
    with pytest.raises(type(error), match=str(error)):
        eventually(lambda: pool.poll() and False)


def test_a_vae_on_the_cpu_is_float32(cards: dict[str, Card]) -> None:
    pool = Pool(cards, "cpu", torch.bfloat16)
    (family,) = load(pool, "tiny-sd3")
    pool.close()
    assert family.vae.dtype == torch.float32 and family.network.dtype == torch.bfloat16  # type: ignore[attr-defined]
    with torch.inference_mode():
        out, _ = family.denoise(
            torch.zeros(1, 4, 8, 8), torch.ones(1), family.encode(passes([family.opposite(ClassLabel(0))]), 24)
        )
        assert out.dtype == torch.float32 and family.decode(out).dtype == torch.uint8


def test_an_unknown_model(pool: Pool) -> None:
    for ask in (pool.want, pool.unload, pool.failure, pool.family, pool.fits, pool.components):
        with pytest.raises(ModelNotFound):
            ask("nothing")
