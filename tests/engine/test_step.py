"""The step against its plain twin: each row alone, one pass at a time, in the words of the formula."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from app.engine.runner import plan_of
from app.engine.step import PASSES, Kept, Slots, denoise_step, gather, indices, totals
from app.families.base import Conditions, Family
from app.request import Guidance, SkipGuidance
from app.samplers.schedule import Schedule
from app.samplers.table import COLUMNS, Table, compile_table
from tests.parts.close import FORWARD, apart, close, furthest
from tests.parts.engine import FakeFamily, card

SHAPE = (4, 4, 6)
FLOW = Schedule(kind="flow", shift=3.0)
EPSILON = Schedule(kind="diffusion", variance="learned_range", spacing="linspace")


def guided(scale: float | None) -> Guidance:
    return Guidance() if scale is None else Guidance(scale)


def plain_step(
    family: Family, table: Table, line: int, x: torch.Tensor, mem: torch.Tensor, noise: torch.Tensor,
    codes: list[float], scale: float | None, kept: Kept | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """One row alone: [C, h, w] in and out."""
    names = ("t", "c_in", "xx", "xo", "xm", "xz", "zf", "mx", "mo", "ka", "kb")
    row = dict(zip(names, table.coefficients()[line], strict=True))
    time = torch.tensor([row["t"]])
    outs = []
    for code in codes:
        out, frac = family.denoise((float(row["c_in"]) * x)[None], time, {"code": torch.tensor([[code]])})
        outs.append((out[0], None if frac is None else frac[0]))
    out, frac = outs[0]
    if scale is not None:
        guided = out + (scale - 1) * (out - outs[1][0])
        channels = family.card.guided_channels
        out = guided if channels is None else torch.cat([guided[:channels], out[channels:]])
    spread = float(row["xz"]) * (1.0 if frac is None else torch.exp(0.5 * float(row["zf"]) * frac))
    new = float(row["xx"]) * x + float(row["xo"]) * out + float(row["xm"]) * mem + spread * noise
    if kept is not None:
        source, first, fresh = kept
        new = torch.where(fresh, new, float(row["ka"]) * source + float(row["kb"]) * first)
    return new, float(row["mx"]) * x + float(row["mo"]) * out


MIX = [  # sampler, steps, strength, the line each row stands at, guidance, whether it has a mask
    ("ddim", 10, None, 3, None, False), ("ddpm", 50, None, 49, 4.0, False), ("ddpm", 250, 0.5, 7, None, True),
    ("euler", 4, None, 0, 7.5, False), ("heun", 10, 1.0, 12, 2.0, True), ("dpmpp_2m", 28, 0.6, 5, None, False),
    ("euler_ancestral", 20, 0.6, 11, 1.5, True), ("ddim", 12, 0.8, 1, 3.0, True), ("heun", 9, 0.7, 3, None, True),
    ("dpmpp_2m", 9, 0.9, 2, None, True),
]  # fmt: skip


@pytest.mark.parametrize("channels", [None, 3])
@pytest.mark.parametrize("bucket", [None, 24])
def test_a_mixed_step_equals_each_row_alone(channels: int | None, bucket: int | None) -> None:
    family = FakeFamily(card(guided_channels=channels), learned_variance=True)
    slots = Slots(12, SHAPE, torch.device("cpu"))
    generator = torch.Generator().manual_seed(1)
    expected = []
    taken = []
    for number, (sampler, steps, strength, line, scale, masked) in enumerate(MIX):
        table = compile_table(EPSILON, sampler, steps, strength=strength)
        codes = [number / 7, number / 5][: 1 if scale is None else 2]
        x, mem, noise, source, first = torch.randn(5, *SHAPE, generator=generator)
        kept = (source, first, torch.rand(SHAPE[1:], generator=generator) > 0.5) if masked else None
        slot = slots.take(plan_of(table, guided(scale)), x, {"code": torch.tensor(codes)[:, None]}, kept=kept)
        slots.mem[slot], slots.noise[slot], slots.line[slot] = mem, noise, line
        expected.append(plain_step(family, table, line, x, mem, noise, codes, scale, kept))
        taken.append(slot)
    order = np.array(taken)[[4, 8, 0, 6, 2, 9, 1, 5, 3, 7]]
    sums = denoise_step(family, slots, order, bucket)
    assert sums.isfinite().all() and len(sums) == (bucket or len(MIX))
    assert family.widths[-1] == (bucket or sum(1 if scale is None else 2 for *_, scale, _ in MIX))
    for slot, (x, mem) in zip(taken, expected, strict=True):
        close(slots.x[slot], x, FORWARD, furthest)
        close(slots.mem[slot], mem, FORWARD, furthest)
        apart(slots.x[slot], x.roll(1, 0), FORWARD, furthest, of="another channel:")


SKIP = SkipGuidance(2.5, 0.0, 1.0)
KINDS = [  # guidance, the lines that it skips layers on, the line the row stands at, passes it makes there
    (Guidance(4.0, skip=SKIP), range(2, 4), 2, 3), (Guidance(4.0, skip=SKIP), range(2, 4), 4, 2),
    (Guidance(4.0), range(0), 2, 2), (Guidance(), range(0), 3, 1),
    (Guidance(2.0, skip=SkipGuidance(4.0, 0.0, 1.0)), range(3), 0, 3),
    (Guidance(embedded=3.5), range(0), 1, 1), (Guidance(3.0, embedded=1.0), range(0), 1, 2),
]  # fmt: skip


@pytest.mark.parametrize("bucket", [None, 16])
@pytest.mark.parametrize("embedded", [False, True])
def test_each_kind_of_guidance_equals_its_row_alone(bucket: int | None, embedded: bool) -> None:
    kind = {"family": "flux", "guidance": "embedded"} if embedded else {}
    family = FakeFamily(card(**kind))
    table = compile_table(FLOW, "flow_euler", 8)
    slots = Slots(7, SHAPE, torch.device("cpu"))
    taken, expected = [], []
    for guidance, skipping, line, _ in KINDS:
        codes, x, t = torch.rand(2, 1)[: 1 + guidance.guided], torch.randn(SHAPE), torch.tensor([float(table.t[line])])
        given = {"guidance": torch.tensor([guidance.embedded or 0.0])} if embedded else {}
        own, other = (family.denoise(x[None], t, {"code": codes[[i]], **given})[0][0] for i in (0, -1))
        skip = {"code": codes[:1], "skip": torch.tensor([True]), **given}
        scale = guidance.skip.scale if guidance.skip and line in skipping else 0
        pull = scale * (own - family.denoise(x[None], t, skip)[0][0])
        expected.append(x + float(table.xo[line]) * (own + (guidance.scale - 1) * (own - other) + pull))
        taken.append(slots.take(plan_of(table, guidance, skipping), x, {"code": codes}))
        slots.line[taken[-1]] = line
    order = np.array([4, 1, 6, 0, 3, 2, 5])
    plan = gather(slots, np.array(taken)[order], bucket)
    denoise_step(family, slots, np.array(taken)[order], bucket)
    assert family.widths[-1] == (bucket or sum(passes for *_, passes in KINDS))
    assert plan.skips is not None and int(plan.skips.sum()) == sum(passes == 3 for *_, passes in KINDS)
    for slot, x in zip(taken, expected, strict=True):
        close(slots.x[slot], x, FORWARD, furthest)
        apart(slots.x[slot], expected[0] if x is not expected[0] else expected[1], FORWARD, furthest, of="another row:")


def test_slots_that_do_not_take_part_and_the_spare_one_stay_as_they_are() -> None:
    family = FakeFamily(card())
    slots = Slots(4, SHAPE, torch.device("cpu"))
    table = compile_table(FLOW, "flow_euler", 4)
    taken = [slots.take(plan_of(table, guided(3.0)), torch.randn(SHAPE), {"code": torch.rand(2, 1)}) for _ in range(3)]
    before = slots.x.clone()
    denoise_step(family, slots, np.array(taken[:1]), 8)
    others = [slot for slot in range(5) if slot != taken[0]]
    assert torch.equal(slots.x[others], before[others])
    assert not torch.equal(slots.x[taken[0]], before[taken[0]])


def test_an_unguided_row_is_exact_beside_a_guided_one() -> None:
    family = FakeFamily(card())
    table = compile_table(FLOW, "flow_euler", 4)
    start = torch.randn(SHAPE)
    results = []
    for company in (False, True):
        slots = Slots(4, SHAPE, torch.device("cpu"))
        rows = [slots.take(plan_of(table, Guidance()), start, {"code": torch.tensor([[0.5]])})]
        if company:
            rows.append(slots.take(plan_of(table, guided(5.0)), torch.randn(SHAPE), {"code": torch.rand(2, 1)}))
        denoise_step(family, slots, np.array(rows))
        results.append(slots.x[rows[0]].clone())
    assert torch.equal(*results)


def test_a_row_that_is_not_finite_is_told_apart_and_harms_no_other() -> None:
    family = FakeFamily(card())
    slots = Slots(4, SHAPE, torch.device("cpu"))
    table = compile_table(FLOW, "flow_euler", 4)
    codes = [0.1, float("nan"), 0.3]
    rows = np.array(
        [slots.take(plan_of(table, Guidance()), torch.randn(SHAPE), {"code": torch.tensor([[code]])}) for code in codes]
    )
    assert denoise_step(family, slots, rows).isfinite().tolist() == [True, False, True]


def test_a_taken_slot_remembers_nothing_of_the_row_before() -> None:
    slots = Slots(1, SHAPE, torch.device("cpu"))
    long, short = compile_table(EPSILON, "ddpm", 250), compile_table(EPSILON, "ddim", 2)
    slot = slots.take(plan_of(long, guided(9.0)), torch.randn(SHAPE), {"code": torch.rand(2, 1)})
    slots.mem[slot], slots.noise[slot], slots.line[slot] = float("nan"), float("nan"), 200
    slots.release(slot)
    again = slots.take(plan_of(short, Guidance()), torch.randn(SHAPE), {"code": torch.rand(1, 1)})
    assert again == slot
    assert not slots.mem[slot].any() and not slots.noise[slot].any()
    assert (slots.line[slot], slots.guided[slot]) == (0, 0)
    np.testing.assert_array_equal(slots.lines(np.array([slot]))[0, : len(COLUMNS)], short.coefficients()[0])


def test_a_row_that_found_no_room_leaves_no_mask_to_the_next_row_of_its_slot() -> None:
    slots, plan = Slots(1, SHAPE, torch.device("cpu")), plan_of(compile_table(FLOW, "flow_euler", 4), guided(None))
    kept = torch.zeros(SHAPE), torch.zeros(SHAPE), torch.zeros(SHAPE[1:], dtype=torch.bool)
    with pytest.raises(RuntimeError):
        slots.take(plan, torch.zeros(SHAPE), {"code": torch.rand(9, 1)}, kept=kept)
    slot = slots.take(plan, torch.zeros(SHAPE), {"code": torch.rand(1, 1)})
    assert slots.masks.among(np.array([slot])) is None


@pytest.mark.parametrize("guided", list(itertools.product([0, 1], repeat=3)))
def test_a_gather_names_each_pass_once_and_pads_with_the_spare(guided: tuple[int, ...]) -> None:
    slots = Slots(5, SHAPE, torch.device("cpu"))
    rows = np.array([4, 0, 2])
    slots.guided[rows] = guided
    none = np.zeros(3, np.int64)
    plan = indices(slots, rows, none)
    assert plan.places.tolist() == [
        p for row, two in zip(rows, guided, strict=True) for p in range(2 * row, 2 * row + 1 + two)
    ]
    assert (plan.places // PASSES == rows[plan.owner]).all()
    padded = indices(slots, rows, none, 8)
    assert {len(index) for index in padded} == {8}
    assert padded.owner[: len(plan.owner)].tolist() == plan.owner.tolist()
    assert (padded.rows[padded.owner[len(plan.owner) :]] == slots.spare).all()
    assert (padded.places[len(plan.places) :] == PASSES * slots.spare).all()
    assert gather(slots, rows).alone == (not any(guided))


def test_what_rows_gather_by_is_kept_until_a_row_comes_or_goes() -> None:
    """And no longer: a slot that is taken again has other conditions, under the same number."""
    table = compile_table(FLOW, "flow_euler", 4)
    slots = Slots(3, SHAPE, torch.device("cpu"))
    taken = [
        slots.take(plan_of(table, guided(3.0)), torch.randn(SHAPE), {"code": torch.full((2, 1), code)})
        for code in (1, 2)
    ]
    rows = np.array(taken)
    kept = gather(slots, rows)
    slots.line[rows] += 1
    assert gather(slots, rows) is kept
    assert gather(slots, rows[::-1].copy()) is not kept
    assert gather(slots, rows, 8) is not kept
    slots.release(taken[1])
    assert slots.take(plan_of(table, Guidance()), torch.randn(SHAPE), {"code": torch.full((1, 1), 5.0)}) == taken[1]
    assert gather(slots, rows).conditions["code"].flatten().tolist() == [1.0, 1.0, 5.0]
    slots.take(plan_of(table, Guidance()), torch.randn(SHAPE), {"other": torch.ones(1, 2)})
    assert set(gather(slots, rows).conditions) == {"code", "other"}


def test_a_row_that_skips_layers_on_some_lines_gathers_anew_on_them() -> None:
    slots = Slots(2, SHAPE, torch.device("cpu"))
    table, codes = compile_table(FLOW, "flow_euler", 4), {"code": torch.rand(2, 1)}
    row = np.array([slots.take(plan_of(table, Guidance(4.0, skip=SKIP), range(1, 3)), torch.randn(SHAPE), codes)])
    passes = []
    for line in range(4):
        slots.line[row] = line
        passes.append(len(gather(slots, row).owner))
    assert passes == [2, 3, 3, 2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_one_number_that_is_not_finite_is_enough(bad: float) -> None:
    latents = torch.randn(3, 16, 64, 64) * 1e6
    latents[1, 3, 60, 7] = bad
    assert totals(latents).isfinite().tolist() == [True, False, True]
    latents[1, 3, 2, 7] = -bad
    assert totals(latents).isfinite().tolist() == [True, False, True]


class MetaFamily(FakeFamily):
    """The same arithmetic on tensors that hold no numbers: whatever asks one for its value raises."""

    def denoise(
        self, x: torch.Tensor, t: torch.Tensor, conditions: Conditions
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        return x + t[:, None, None, None] * conditions["code"][:, :, None, None], None


@pytest.mark.parametrize("bucket", [None, 16])
def test_a_step_never_waits_for_the_device(bucket: int | None) -> None:
    """On the meta device a step that read a value back on the host would raise, as `.item()` here does."""
    meta = torch.device("meta")
    slots, table = Slots(4, SHAPE, meta), compile_table(EPSILON, "ddpm", 10)
    for scale in (None, 3.0, None):
        codes = torch.zeros(1 if scale is None else 2, 1, device=meta)
        slots.take(plan_of(table, guided(scale)), torch.zeros(SHAPE, device=meta), {"code": codes})
    sums = denoise_step(MetaFamily(card()), slots, np.array([3, 2, 1]), bucket)
    assert sums.shape == (bucket or 3,)
    with pytest.raises(RuntimeError):
        sums.sum().item()
