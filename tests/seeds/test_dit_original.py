"""DiT as the shipped card says it, against the original's own arithmetic (plain_dit.py): network, sampling, tensors."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.cards.cards import read_card
from app.checkpoints.convert import convert_dit
from app.engine.runner import plan_of
from app.engine.step import Slots, denoise_step
from app.families import DiT
from app.families.authors import from_original
from app.families.dit import predict
from app.request import ClassLabel, Guidance
from app.samplers.table import compile_table
from tests.families.plain import load
from tests.parts.close import EXACT, FORWARD, SAME, apart, close, relative
from tests.parts.requests import passes
from tests.parts.tiny import write_dit
from tests.parts.tiny_parts import read_state
from tests.seeds import plain_dit
from tests.seeds.plain_dit import State, doubled, original_state

ROOT = Path(__file__).parent.parent.parent
CARD = read_card(ROOT / "models" / "dit-xl-2-256" / "card.toml")
ORIGINAL = {name: getattr(CARD, name) for name in ("schedule", "time_freq_shift", "norm_eps", "guided_channels")}
HEADS = 3
NULL = 10
TIMES = torch.tensor([0, 7, 250, 500, 999])
LABELS = torch.tensor([0, 3, 9, NULL, 5])
FORMS: dict[str, dict[str, Any]] = {
    "patch 2": {"attention_head_dim": 16, "num_layers": 4},
    "patch 4": {"attention_head_dim": 24, "num_layers": 2, "patch_size": 4},
    "patch 8": {"attention_head_dim": 8, "num_layers": 3, "patch_size": 8},
    "heads of 72, as XL": {"attention_head_dim": 72, "num_layers": 2},
}
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module", params=FORMS)
def made(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    """A checkpoint in diffusers' layout, and its tensors by the authors' names."""
    folder = tmp_path_factory.mktemp("dit")
    form = FORMS[request.param]
    write_dit(folder, classes=NULL, num_attention_heads=HEADS, **form)
    return folder, original_state(read_state(folder / "transformer"), 8 // form.get("patch_size", 2))


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, State]:
    folder = tmp_path_factory.mktemp("small")
    write_dit(folder, classes=NULL, num_attention_heads=HEADS)
    return folder, original_state(read_state(folder / "transformer"), 4)


def latents(seed: int) -> torch.Tensor:
    return torch.randn((len(TIMES), 4, 8, 8), generator=torch.Generator().manual_seed(seed))


def test_the_card_says_the_originals_arithmetic() -> None:
    assert (CARD.time_freq_shift, CARD.norm_eps, CARD.guided_channels) == (0, plain_dit.EPS, 3)
    other = read_card(ROOT / "models" / "dit-xl-2-512" / "card.toml")
    its_own = ("id", "description", "source", "defaults", "limits", "parameters", "folder")
    assert other.model_copy(update={name: getattr(CARD, name) for name in its_own}) == CARD


@torch.inference_mode()
def test_a_forward_is_the_originals(made: tuple[Path, State]) -> None:
    folder, state = made
    dit = load(folder, **ORIGINAL)
    assert isinstance(dit, DiT)
    out, frac = dit.denoise(latents(0), TIMES.float(), {"label": LABELS})
    theirs = plain_dit.forward(state, HEADS, latents(0), TIMES, LABELS)
    assert frac is not None
    close(torch.cat([out, 2 * frac - 1], 1), theirs, FORWARD)
    for row, whole in enumerate(theirs):
        close(out[row], whole[:4], FORWARD, of=f"t = {TIMES[row]}")
    # In float64 what is left is no rounding.
    ours = predict(dit.network.double(), latents(0).double(), TIMES.float(), LABELS)
    close(ours, plain_dit.forward(doubled(state), HEADS, latents(0).double(), TIMES, LABELS), EXACT)


@pytest.mark.slow
@torch.inference_mode()
def test_diffusers_arithmetic_is_another(made: tuple[Path, State]) -> None:
    """Controls: each of the two card fields, and both, as diffusers has them."""
    folder, state = made
    theirs = plain_dit.forward(doubled(state), HEADS, latents(0).double(), TIMES, LABELS)

    def off(**fields: float | None) -> float:
        network = load(folder, **{**ORIGINAL, **fields}).network.double()
        return relative(predict(network, latents(0).double(), TIMES.float(), LABELS), theirs)

    assert off(time_freq_shift=None, norm_eps=None) > 0.05
    assert off(time_freq_shift=1.0) > 0.05
    assert off(norm_eps=None) > 1e-7, "little, because these tokens are not small"
    shifted = plain_dit.forward(doubled(state), HEADS, latents(0).double(), TIMES, LABELS, half=127)
    apart(shifted, theirs, 0.005)


ASKED = ((3, 10, 4.0), (9, 25, None), (0, 100, 4.0), (5, 50, 1.5), (7, 250, 4.0), (2, 163, 4.0))
"""class, steps, guidance (None: none)"""


def injected(case: int, steps: int) -> torch.Tensor:
    """The first noise and that of every step."""
    return torch.randn((steps + 1, 1, 4, 8, 8), generator=torch.Generator().manual_seed(case))


def run_together(dit: DiT, cases: tuple[tuple[int, int, float | None], ...]) -> list[torch.Tensor]:
    """The final latents of rows that share every forward until they are done, the noise given."""
    slots, taken, left = Slots(len(cases), (4, 8, 8), torch.device("cpu")), [], {}
    for case, (label, steps, scale) in enumerate(cases):
        table = compile_table(dit.card.schedule, "ddpm", steps)
        noise = injected(case, steps)
        guidance = Guidance() if scale is None else Guidance(scale)
        both = passes([ClassLabel(label), dit.opposite(ClassLabel(label))])
        conditions = dit.encode(both[: 1 if scale is None else 2], 0)
        slot = slots.take(plan_of(table, guidance), noise[0][0] * table.init, conditions)
        taken.append(slot)
        left[slot] = iter(noise[1:])
    ends = {slot: steps for slot, (_, steps, _) in zip(taken, cases, strict=True)}
    while rows := [slot for slot in taken if slots.line[slot] < ends[slot]]:
        for slot in rows:
            slots.noise[slot] = next(left[slot])[0]
        assert denoise_step(dit, slots, np.array(rows)).isfinite().all()
        slots.line[rows] += 1
    return [slots.x[slot].clone()[None] for slot in taken]


@pytest.fixture(scope="module")
def sampled(small: tuple[Path, State]) -> list[torch.Tensor]:
    """`ASKED` by the original's arithmetic in float64."""
    _, state = small
    with torch.inference_mode():
        return [
            plain_dit.sample(
                doubled(state), HEADS, label, noise[0], lambda step, noise=noise: noise[step + 1],
                steps=steps, scale=scale, null=NULL,
            )
            for case, (label, steps, scale) in enumerate(ASKED)
            for noise in [injected(case, steps)]
        ]  # fmt: skip


@torch.inference_mode()
def test_sampling_is_the_originals(small: tuple[Path, State], sampled: list[torch.Tensor]) -> None:
    dit = load(small[0], **ORIGINAL)
    assert isinstance(dit, DiT)
    for (label, steps, scale), ours, theirs in zip(ASKED, run_together(dit, ASKED), sampled, strict=True):
        close(ours, theirs, SAME, of=(label, steps, scale))


WRONG: dict[str, dict[str, Any]] = {
    "fixed variance": {"schedule": CARD.schedule.model_copy(update={"variance": "fixed_small"})},
    "another grid": {"schedule": CARD.schedule.model_copy(update={"spacing": "leading"})},
    "four channels guided": {"guided_channels": None},
    "diffusers' network": {"time_freq_shift": None, "norm_eps": None},
}


@pytest.mark.parametrize("wrong", WRONG)
@torch.inference_mode()
def test_sampling_otherwise_is_told_from_it(small: tuple[Path, State], sampled: list[torch.Tensor], wrong: str) -> None:
    dit = load(small[0], **{**ORIGINAL, **WRONG[wrong]})
    assert isinstance(dit, DiT)
    (ours,) = run_together(dit, ASKED[:1])
    apart(ours, sampled[0], SAME)


def test_the_timesteps_are_those_of_create_diffusion() -> None:
    for steps in range(2, 1001):
        table = compile_table(CARD.schedule, "ddpm", steps)
        assert table.t[::-1].tolist() == plain_dit.respaced(steps), steps


def test_timesteps_that_are_multiplied_not_summed_differ_at_278_counts() -> None:
    differ = {
        steps for steps in range(2, 1001) if plain_dit.respaced(steps) != np.linspace(0, 999, steps).round().tolist()
    }
    assert len(differ) == 278 and {21, 23, 31, 43, 91, 163, 249} <= differ


@torch.inference_mode()
def test_sampling_on_multiplied_timesteps_is_told_from_it(
    small: tuple[Path, State], sampled: list[torch.Tensor]
) -> None:
    dit = load(small[0], **{**ORIGINAL, "schedule": CARD.schedule.model_copy(update={"spacing": "linspace"})})
    assert isinstance(dit, DiT) and ASKED[-1][1] == 163
    apart(run_together(dit, ASKED)[-1], sampled[-1], SAME)


def test_the_authors_layout_gives_the_tensors_of_diffusers(made: tuple[Path, State]) -> None:
    folder, state = made
    theirs = read_state(folder / "transformer")
    ours = from_original("DiTTransformer2DModel", state)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[key], theirs[key]) for key in theirs)


@torch.inference_mode()
def test_a_converted_pt_is_the_same_model(made: tuple[Path, State], tmp_path: Path) -> None:
    """The authors' file through `models convert`, and diffusers' layout with the card's arithmetic."""
    folder, state = made
    torch.save(state, tmp_path / "DiT.pt")
    converted = tmp_path / "converted"
    convert_dit(tmp_path / "DiT.pt", converted, folder / "vae", lambda line: None, dtype=torch.float32, heads=HEADS)
    ours, theirs = (read_state(one / "transformer") for one in (converted, folder))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)
    card, network = read_card(converted / "card.toml"), load(converted)
    assert {name: getattr(card, name) for name in ORIGINAL} == ORIGINAL
    assert isinstance(network, DiT)
    out, _ = network.denoise(latents(0), TIMES.float(), {"label": LABELS})
    close(out, plain_dit.forward(state, HEADS, latents(0), TIMES, LABELS)[:, :4], FORWARD)
