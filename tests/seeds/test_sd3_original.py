"""SD3 from one file of its authors' names, run by the engine, against the authors' program re-derived in float64.

Their `dpmpp_2m` is our `flow_dpmpp_2m_sd3`; diffusers' multistep, `flow_dpmpp_2m`, is another algorithm.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from app.cards.cards import read_cards
from app.pool.pool import Pool
from app.request import Prompt
from app.samplers.schedule import Schedule
from app.samplers.table import compile_table
from tests.families import plain_originals
from tests.families.plain import ask, final, serve
from tests.families.plain_shapes import State, drawn, sd3_shapes
from tests.parts.close import EXACT, SAME, apart, close, each
from tests.parts.engine import load_all
from tests.parts.requests import passes
from tests.parts.tiny import write_sd3
from tests.samplers.oracle import draw, network, run_table
from tests.seeds import plain_sd3
from tests.seeds.plain_dit import doubled

pytestmark = pytest.mark.usefixtures("one_thread")

HEADS = 2
PROMPT = Prompt("a red apple on a blue background", negative="green dog")
SHIFTS = {"medium": 1.0, "large": 3.0}
"""Of sd3_infer.py: SD3-medium runs at 1, SD3.5 at 3."""


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 4, 10, 28, 40, 50, 100])
def test_the_table_is_the_authors_multistep(steps: int, shift: float) -> None:
    table, noise = compile_table(Schedule(kind="flow", shift=shift), "flow_dpmpp_2m_sd3", steps), draw(steps)

    def clean(x: np.ndarray, level: float) -> np.ndarray:
        return x - level * network(x, 1000 * level)

    levels = plain_sd3.sigmas(shift, steps)
    wanted = plain_sd3.dpmpp_2m(clean, noise[0], levels)
    close(table.t, 1000 * np.array(levels[:-1]), EXACT, each)
    close(run_table(table, network, noise).final, wanted, EXACT)
    if steps > 1:
        other = compile_table(Schedule(kind="flow", shift=shift), "flow_dpmpp_2m", steps)
        apart(run_table(other, network, noise).final, wanted, SAME, of="diffusers' multistep:")


@pytest.fixture(scope="module")
def states() -> dict[str, State]:
    """By the authors' names."""
    kinds: dict[str, dict[str, Any]] = {"medium": {}, "large": {"norm": True}}
    return {name: drawn(sd3_shapes(16 * HEADS, 2, **kind), seed=len(name)) for name, kind in kinds.items()}


@pytest.fixture(scope="module")
def pool(states: dict[str, State], tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Cards whose network is one file in the authors' layout, with the shift that the authors run it at."""
    folder = tmp_path_factory.mktemp("authors")
    for name, state in states.items():
        write_sd3(folder / name, name=name, **({"qk_norm": "rms_norm"} if name == "large" else {}))
        (folder / name / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
        save_file(state, folder / name / f"{name}.safetensors")
        card = folder / name / "card.toml"
        text = card.read_text().replace("shift = 3.0", f"shift = {SHIFTS[name]}")
        card.write_text(f'files = {{ transformer = "{name}.safetensors" }}\n{text}')
    loaded = load_all(Pool(read_cards(folder), "cpu", torch.float32))
    yield loaded
    loaded.close()


@torch.inference_mode()
def authors(
    pool: Pool, name: str, state: State, *, size: tuple[int, int], steps: int, guidance: float, seed: int = 0,
    shift: float | None = None,
) -> torch.Tensor:  # fmt: skip
    """`do_sampling` of sd3_infer.py for one image of a VAE of scale 4: both passes in one batch, then guidance."""
    (width, height), family = size, pool.family(name)
    texts = family.encode(passes([PROMPT, Prompt(PROMPT.negative)]), 24)
    text, pooled, state = texts["text"].double(), texts["pooled"].double(), doubled(state)

    def clean(x: torch.Tensor, level: float) -> torch.Tensor:
        both, t = torch.cat([x, x]), torch.tensor([1000 * level] * 2)
        asked, opposite = (both - level * plain_originals.sd3(state, HEADS, both, t, pooled, text)).chunk(2)
        return opposite + (asked - opposite) * guidance

    noise = torch.randn(1, 4, height // 4, width // 4, generator=torch.Generator().manual_seed(seed))
    return plain_sd3.dpmpp_2m(clean, noise.double(), plain_sd3.sigmas(shift or SHIFTS[name], steps))


CASES: list[tuple[str, dict[str, Any]]] = [
    ("medium", {"size": (48, 32), "steps": 50, "guidance": 5.0}),
    ("large", {"size": (32, 32), "steps": 40, "guidance": 4.5, "seed": 3}),
    ("large", {"size": (16, 64), "steps": 4, "guidance": 2.0, "seed": 4}),
]


def ours(pool: Pool, name: str, case: dict[str, Any], sampler: str = "flow_dpmpp_2m_sd3") -> torch.Tensor:
    (result,) = serve(pool, ask(name, PROMPT, sampler=sampler, **case))
    return final(result)


@pytest.mark.parametrize(("name", "case"), CASES)
def test_latents_are_those_of_the_authors(
    pool: Pool, states: dict[str, State], name: str, case: dict[str, Any]
) -> None:
    right = authors(pool, name, states[name], **case)
    close(ours(pool, name, case), right, SAME)


def test_controls_are_told(pool: Pool, states: dict[str, State]) -> None:
    """diffusers' multistep, Euler, the other shift, another guidance, one step more."""
    name, case = CASES[1]
    right = authors(pool, name, states[name], **case)
    for sampler in ("flow_dpmpp_2m", "flow_euler"):
        apart(ours(pool, name, case, sampler), right, SAME, of=sampler)
    got = ours(pool, name, case)
    for wrong in ({"shift": 1.0}, {"guidance": 4.4}, {"steps": 41}):
        apart(got, authors(pool, name, states[name], **{**case, **wrong}), SAME, of=wrong)
