"""An engine in this process, and a family and a pool of arithmetic alone, which need no network and no files."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from app.cards.card import Card
from app.engine.costs import Costs, Curve
from app.engine.engine import Engine
from app.errors import LoadError
from app.families.base import Conditions, Family
from app.families.text import Cut, Encoder, Read, States, cut_text, read_texts
from app.pool.policy import Parts
from app.pool.pool import Pool
from app.report import Failure, ModelState, Phase, Report, Result, Tick
from app.request import ClassLabel, Condition, ImageSpec, Key, Pass, Prompt, Request
from app.settings import Settings
from tests.parts.requests import flat
from tests.parts.waiting import eventually

POISON = Prompt("poison")
NOT_A_NUMBER = Prompt("nan")
NOWHERE = Path("/nonexistent")


def card(name: str = "fake", **changes: Any) -> Card:
    facts: dict[str, Any] = {
        "id": name,
        "family": "sd3",
        "source": {"path": "."},
        "schedule": {"kind": "flow", "shift": 3.0},
        "defaults": {"sampler": "flow_euler", "num_inference_steps": 8, "guidance_scale": 4.0, "size": "32x32"},
        "limits": {"sizes": {"min": 16, "max": 64, "multiple": 16}},
    }
    return Card(**{**facts, **changes})


class FakeFamily:
    """A smooth function of latent, time and condition, different for each condition; rows do not see each other."""

    device = torch.device("cpu")
    dtype = torch.float32
    network = torch.nn.Module()

    def __init__(self, card: Card, learned_variance: bool = False) -> None:
        self.card = card
        self.learned_variance = learned_variance
        self.widths: list[int] = []
        self.encoded: list[int] = []
        self.encoder = Encoder(_Codes(), _Letters(), self._states)

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        return (4, height // 8, width // 8)

    def image_tokens(self, width: int, height: int) -> int:
        return width * height // 256

    passes = Family.passes

    def opposite(self, condition: Condition) -> Condition:
        return Prompt(condition.negative or "") if isinstance(condition, Prompt) else ClassLabel(10)

    def encode(
        self, passes: Sequence[Pass], text_length: int, batch: int | None = None, read: Read = read_texts
    ) -> Conditions:
        conditions = [one.condition for one in passes]
        if POISON in conditions:
            raise ValueError("a poison prompt")
        if isinstance(conditions[0], ClassLabel):
            return {"code": torch.tensor([[_code(each)] for each in conditions if each])}
        texts = [each.text for each in conditions if isinstance(each, Prompt)]
        return {"code": read(self.encoder, texts, text_length, batch)[0]}

    def _states(self, network: Any, ids: torch.Tensor) -> States:
        self.encoded.append(len(ids))
        return (ids,)

    def blank(self, text_length: int) -> Conditions:
        return {"code": torch.zeros(1, 1)}

    def prepare(self) -> None:
        pass

    def truncated(self, condition: Condition | None, text_length: int, cut: Cut = cut_text) -> str | None:
        return None

    def denoise(
        self, x: torch.Tensor, t: torch.Tensor, conditions: Conditions
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        self.widths.append(len(x))
        assert t.shape == (len(x),)
        code = conditions["code"][:, :, None, None]
        if "guidance" in conditions:
            code = code + 0.2 * conditions["guidance"][:, None, None, None]
        if "skip" in conditions:
            code = torch.where(conditions["skip"][:, None, None, None], 0.5 * code, code)
        out = torch.tanh(0.7 * x + code) + 0.3 * torch.cos(t / 300)[:, None, None, None] * x
        return out, torch.sigmoid(out) if self.learned_variance else None

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        rows, _, height, width = latents.shape
        flat = (torch.sigmoid(latents[:, :3]) * 255).to(torch.uint8)
        return flat.permute(0, 2, 3, 1).reshape(rows, height, width, 3)

    preview = decode


class Costly(FakeFamily):
    """A network whose forward takes `cost(passes)` seconds of a clock, a list of one number.

    cold: how many times that takes the first forward of each number of passes.
    """

    def __init__(self, cost: Callable[[int], float], clock: list[float], cold: float = 1.0) -> None:
        super().__init__(card(limits={"num_inference_steps": 50, "sizes": {"min": 16, "max": 64}}))
        self.cost, self.clock, self.cold = cost, clock, cold

    def denoise(self, x: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> tuple[torch.Tensor, None]:
        self.clock[0] += self.cost(len(x)) * (1.0 if len(x) in self.widths else self.cold)
        self.widths.append(len(x))
        return x, None


class _Codes(torch.nn.Linear):
    """Stands for a network with weights."""

    device = torch.device("cpu")

    def __init__(self) -> None:
        super().__init__(1, 1)


class _Letters:
    """A tokenizer whose one token is the text's code."""

    def __call__(self, texts: list[str], **_: object) -> SimpleNamespace:
        codes = [[float("nan") if Prompt(text) == NOT_A_NUMBER else _code(Prompt(text))] for text in texts]
        return SimpleNamespace(input_ids=torch.tensor(codes))


def _code(condition: Condition) -> float:
    if isinstance(condition, ClassLabel):
        return condition.index / 10
    return sum(map(ord, condition.text)) % 97 / 97


class FakePool:
    """Every model is ready at once, or when `present` says so."""

    device = torch.device("cpu")
    blocked = False
    loading = ""

    def __init__(self, *families: FakeFamily) -> None:
        self.families = {family.card.id: family for family in families}
        self.cards = {name: family.card for name, family in self.families.items()}
        self.present = set(self.families)
        self.errors: dict[str, LoadError] = {}
        self.states: list[ModelState] = []
        self.leases = 0
        self.bytes: dict[str, int] = {}

    def want(self, model_id: str) -> None:
        pass

    def need(self, waiting: Sequence[Parts], kept: Collection[str], urgent: Sequence[Parts]) -> None:
        pass

    def components(self, model_id: str, phase: Phase, adapters: Collection[str] = ()) -> list[Any]:
        """One for each phase of a model: its name, and the phase's."""
        return [(model_id, phase)]

    def lease(self, components: Sequence[Any]) -> bool:
        here = all(self.resident(*one) for one in components)
        self.leases += len(components) if here else 0
        return here

    def release(self, components: Sequence[Any]) -> None:
        self.leases -= len(components)

    def resident(self, model_id: str, phase: Phase, adapters: Collection[str] = ()) -> bool:
        return model_id in self.present

    def family(self, model_id: str) -> FakeFamily | None:
        return self.families[model_id] if model_id in self.present else None

    def version(self, network: object) -> int:
        return 1

    def size(self, model_id: str) -> int:
        return 1_000_000

    def fits(self, model_id: str, adapters: Collection[str] = ()) -> bool:
        return True

    def failure(self, model_id: str, adapters: Collection[str] = ()) -> LoadError | None:
        return self.errors.get(model_id)

    def poll(self) -> list[ModelState]:
        states, self.states = self.states, []
        return states

    def close(self) -> None:
        pass


class Still(Curve):
    """A curve that learns nothing, for tests that count forwards."""

    def trial(self) -> int:
        return 0

    def learn(self, passes: int, seconds: float, now: float) -> bool:
        return False


class FakeCosts(Costs):
    """Seconds by passes as a test wants them: `passes` is the width that saturates."""

    def __init__(self, passes: int = 16, rate: float = 1e-3) -> None:
        super().__init__(NOWHERE)
        self.curve = {passes: passes * rate}

    def stored(self, family: object, key: Key) -> Curve | None:
        return Still(self.curve)


def request(name: str, **changes: Any) -> Request:
    facts: dict[str, Any] = {
        "id": name,
        "model": "fake",
        "images": (ImageSpec(Prompt(name), 7),),
        "width": 32,
        "height": 32,
        "sampler": "flow_euler",
        "steps": 8,
        "guided": True,
        "guidance": 4.0,
        "text_length": 24,
        "keep_latents": True,
    }
    return flat(**{**facts, **changes})


def load_all(pool: Pool) -> Pool:
    """Load every model of a real pool."""

    def loaded() -> bool:
        for name in pool.cards:
            assert pool.failure(name) is None, pool.failure(name)
        return all(pool.resident(name, "denoise") for name in pool.cards)

    for name in pool.cards:
        pool.want(name)
    eventually(loaded, 60)
    return pool


class Bench:
    """Collects reports; `ticks` are the forwards, `results` and `failures` are by (request id, index) and id."""

    def __init__(
        self, pool: Any, *, deterministic: bool = False, threads: int = 0, costs: Any = None, **engine: Any
    ) -> None:
        settings = Settings(deterministic=deterministic, threads=threads, cache=NOWHERE)
        self.reports: list[Report] = []
        costs = costs or FakeCosts()
        costs.deterministic = deterministic
        self.engine = Engine(pool, settings, self.reports.append, costs=costs, **engine)

    def run(self, requests: Iterable[Request] = (), most: int = 100_000) -> Bench:
        """Submit, then turn until nothing is left to do."""
        for request in requests:
            self.engine.submit(request)
        for _ in range(most):
            if not self.engine.tick():
                return self
        raise AssertionError("the engine does not come to rest")

    def until(self, done: Callable[[], object], seconds: float = 60.0, failing: bool = False) -> None:
        """Turn until this is true, also while models load: an idle turn sleeps, or the loader would starve.

        failing: failures are expected; else none may come meanwhile.
        """
        deadline = time.monotonic() + seconds
        while not done():
            assert failing or not self.failures, self.failures
            assert time.monotonic() < deadline, f"{len(self.results)} images are answered"
            if not self.engine.tick():
                time.sleep(0.002)

    def turn(self, times: int = 1) -> None:
        for _ in range(times):
            self.engine.tick()

    @property
    def forwards(self) -> list[Tick]:
        return [report for report in self.reports if isinstance(report, Tick) and report.phase == "denoise"]

    @property
    def results(self) -> dict[tuple[str, int], Result]:
        return {(each.request_id, each.index): each for each in self.reports if isinstance(each, Result)}

    @property
    def failures(self) -> dict[str, Failure]:
        return {each.request_id: each for each in self.reports if isinstance(each, Failure)}

    def of(self, kind: type[Report]) -> list[Any]:
        return [each for each in self.reports if isinstance(each, kind)]
