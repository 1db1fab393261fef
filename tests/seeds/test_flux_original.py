"""FLUX.1 from one file of its authors' names, run by the engine, against the authors' sampling re-derived here.

Run beside black-forest-labs/flux itself (commit 802fb47: model.py, sampling.py) on four tiny configs, the engine's
final latents are equal to 7e-7 in float32, and to 4e-3 to 8e-3 in bfloat16, where theirs are bfloat16 too.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from app.cards.cards import read_cards
from app.pool.pool import Pool
from app.request import Prompt
from tests.families.plain import ask, final, serve
from tests.families.plain_originals import flux
from tests.families.plain_shapes import State, drawn, flux_shapes
from tests.parts.close import SAME, apart, close
from tests.parts.engine import load_all
from tests.parts.requests import passes
from tests.parts.tiny import write_flux

pytestmark = pytest.mark.usefixtures("one_thread")

AXES, HEADS = (4, 6, 6), 2
PROMPT = Prompt("a red apple on a blue background")
BLOCKS = {"schnell": (1, 2), "dev": (2, 1)}
States = dict[str, State]


@pytest.fixture(scope="module")
def states() -> States:
    """By the authors' names."""
    return {
        name: drawn(flux_shapes(16 * HEADS, *blocks, guided=name == "dev"), seed=len(name))
        for name, blocks in BLOCKS.items()
    }


@pytest.fixture(scope="module")
def pool(states: States, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pool]:
    """Cards whose network is one file in the authors' layout; dev with the authors' own shift."""
    folder = tmp_path_factory.mktemp("authors")
    for name, (double, single) in BLOCKS.items():
        config: dict[str, Any] = {"attention_head_dim": 16, "num_attention_heads": HEADS, "axes_dims_rope": AXES}
        counts = {"num_layers": double, "num_single_layers": single}
        write_flux(folder / name, dev=name == "dev", **counts, **config)
        (folder / name / "transformer" / "diffusion_pytorch_model.safetensors").unlink()
        save_file(states[name], folder / name / f"flux1-{name}.safetensors")
        card = folder / name / "card.toml"
        text = card.read_text().replace("base_tokens = 4, max_tokens = 64", "base_tokens = 256, max_tokens = 4096")
        card.write_text(f'files = {{ transformer = "flux1-{name}.safetensors" }}\n{text}')
    loaded = load_all(Pool(read_cards(folder), "cpu", torch.float32))
    yield loaded
    loaded.close()


def line(tokens: int) -> float:
    """mu of an image of so many tokens: 0.5 at 256, 1.15 at 4096 (get_lin_function of sampling.py)."""
    return 0.5 + (1.15 - 0.5) * (tokens - 256) / (4096 - 256)


@torch.inference_mode()
def authors(
    pool: Pool, name: str, state: State, *, size: tuple[int, int], steps: int, scale: float, seed: int = 0,
    mu: Callable[[int], float] = line,
) -> torch.Tensor:  # fmt: skip
    """get_noise, prepare, get_schedule, denoise and unpack of sampling.py, for one image of a VAE of scale 4."""
    (width, height), family = size, pool.family(name)
    rows, columns, dev = height // 8, width // 8, name == "dev"
    told = family.encode(passes([PROMPT]), family.card.text.t5)
    x = torch.randn(1, 4, 2 * rows, 2 * columns, generator=torch.Generator().manual_seed(seed))
    x = x.unflatten(3, (columns, 2)).unflatten(2, (rows, 2)).permute(0, 2, 4, 1, 3, 5).reshape(1, rows * columns, 16)
    places = torch.tensor([[0.0, row, column] for row in range(rows) for column in range(columns)])
    times = torch.linspace(1, 0, steps + 1, dtype=torch.float64)
    if dev:
        power = torch.tensor(mu(rows * columns), dtype=torch.float64).exp()
        times = power / (power + 1 / times - 1)
    guidance = torch.tensor([scale]) if dev else None
    for now, then in zip(times[:-1].float(), times[1:].float(), strict=True):
        out = flux(state, HEADS, x, places, told["text"], told["pooled"], now[None], guidance, AXES)
        x = x + (then - now) * out
    return x.view(1, rows, columns, 4, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(1, 4, 2 * rows, 2 * columns)


CASES: list[tuple[str, dict[str, Any]]] = [
    ("schnell", {"size": (40, 24), "steps": 4, "scale": 0.0}),
    ("schnell", {"size": (16, 56), "steps": 8, "scale": 0.0, "seed": 3}),
    ("dev", {"size": (40, 24), "steps": 28, "scale": 3.5}),
    ("dev", {"size": (64, 64), "steps": 5, "scale": 1.0, "seed": 3}),
]


@pytest.mark.parametrize(("name", "case"), CASES)
def test_latents_are_those_of_the_authors(pool: Pool, states: States, name: str, case: dict[str, Any]) -> None:
    right = authors(pool, name, states[name], **case)
    close(ours(pool, name, case), right, SAME)


def test_controls_are_told(pool: Pool, states: States) -> None:
    """Another guidance, a shift that does not depend on the size, weights of one tensor turned over."""
    name, case = CASES[2]
    got = ours(pool, name, case)
    turned = {**states[name], "single_blocks.0.linear2.weight": states[name]["single_blocks.0.linear2.weight"].flip(1)}
    for wrong in (
        authors(pool, name, states[name], **{**case, "scale": 3.4}),
        authors(pool, name, states[name], **case, mu=lambda tokens: 1.15),
        authors(pool, name, turned, **case),
    ):
        apart(got, wrong, SAME)


def ours(pool: Pool, name: str, case: dict[str, Any]) -> torch.Tensor:
    options = {key: value for key, value in case.items() if key != "scale"}
    embedded = case["scale"] if name == "dev" else None
    length = pool.cards[name].text.t5
    request = ask(name, PROMPT, sampler="flow_euler", guidance=0.0, embedded=embedded, text_length=length, **options)
    (result,) = serve(pool, request)
    return final(result)
