"""Runner: computes a Work on the device. Encodes rows into slots, runs their steps, decodes their latents.

Cores: how many threads a forward on a CPU may use beside other processes.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import numpy as np
import torch

from app.engine.costs import Costs
from app.engine.row import Row, Work
from app.engine.step import LINE, SKIP, SlotPool, denoise_step
from app.errors import EngineError, InstepError, OutOfMemory
from app.families.base import Conditions, Family
from app.families.text import TextCache
from app.pool.memory import Component
from app.pool.pool import Pool, use_threads
from app.request import Condition, Guidance, Prompt
from app.samplers.table import COLUMNS, Table, compile_table

_STAT = Path("/proc/stat")

LOOK = 0.2
"""Seconds between two looks at the other processes, and the span that a look is about."""

SLACK = 0.4
"""Cores that others may use in all before a thread is given up: below this, all threads are still faster."""

ALONE = "this image alone does not fit in the device's memory"

Compute = Callable[[list[Row], Work], None]
"""What one phase does for rows of a work; it may raise for all of them."""


def isolate(phase: Compute, rows: list[Row], work: Work) -> None:
    """Run a phase; when it raises (out of memory too), halve the rows and run each half again, until one row fails
    alone. Phases change nothing before they succeed."""
    if not rows:
        return
    error = attempt(lambda: phase(rows, work), phase.__name__.strip("_"))
    if error is None:
        return
    work.out_of_memory += isinstance(error, OutOfMemory)
    if len(rows) == 1:
        work.failed.append((rows[0], error))
        return
    middle = len(rows) // 2
    isolate(phase, rows[:middle], work)
    isolate(phase, rows[middle:], work)


def attempt(call: Callable[[], None], where: str) -> InstepError | None:
    """The error of a call, or None. Nothing of the exception outlives it: its traceback holds tensors."""
    try:
        call()
    except torch.AcceleratorError:
        raise
    except torch.OutOfMemoryError:
        return OutOfMemory(ALONE)
    except InstepError as error:
        return error.again()
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:  # one row must not end the others: tokenizers panic as BaseException
        return EngineError(f"{type(error).__name__} in {where}")
    return None


def conditions_of(family: Family, row: Row) -> list[Condition]:
    """The row's own condition, and where it is guided the one that guidance moves away from."""
    own = Prompt(row.condition.text) if isinstance(row.condition, Prompt) else row.condition
    return [own, family.opposite(row.condition)] if row.request.recipe.guidance.guided else [own]


def encode_rows(family: Family, rows: list[Row], batch: int | None, texts: TextCache) -> list[Conditions]:
    """The conditions of each of these rows of one key, [1 or 2, ...] by name, in the order of `conditions_of`.

    Texts that are not cached are encoded, in one batch for each encoder; the encoders must be on the device.
    batch: as `Family.encode`.
    """
    wanted = [conditions_of(family, row) for row in rows]
    places = {one: place for place, one in enumerate(dict.fromkeys(one for both in wanted for one in both))}
    encoded = family.encode(list(places), rows[0].key.text_length, batch, partial(texts.read, family.card.id))
    parts = {name: value.chunk(len(places)) for name, value in encoded.items()}
    return [{name: torch.cat([part[places[one]] for one in both]) for name, part in parts.items()} for both in wanted]


def plan_of(table: Table, guidance: Guidance, skipping: range = range(0)) -> np.ndarray:
    """The plan of a row for its slot, float32 [lines, len(LINE)]. skipping: its lines with skip-layer guidance."""
    plan = np.zeros((table.lines, len(LINE)), np.float32)
    plan[:, : len(COLUMNS)] = table.coefficients()
    plan[:, len(COLUMNS) :] = guidance.scale - 1 if guidance.guided else 0.0, 0.0, guidance.embedded or 0.0
    if guidance.skip:
        plan[skipping.start : skipping.stop, SKIP] = guidance.skip.scale
    return plan


class Runner:
    """The device's side of the engine: slots by key, cached conditions, and the phases.

    deterministic: every phase is padded to the card's bucket, so that a row's bits do not depend on its neighbours.
    """

    def __init__(self, pool: Pool, costs: Costs, deterministic: bool, text_bytes: int, adapts: bool = True) -> None:
        """text_bytes: of the device, for the cache of encoded prompts. adapts: leave cores to other processes, except
        in deterministic mode, where the number of threads decides bits."""
        self.slots = SlotPool()
        self.texts = TextCache(text_bytes, pool.version)
        self._pool, self._costs, self._deterministic = pool, costs, deterministic
        self._unread: list[tuple[list[Row], torch.Tensor]] = []
        self._cores: Cores | None = None
        self._adapts = adapts and not deterministic and pool.device.type == "cpu"

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes of the device in use here, by kind: the slots of all keys, and encoded prompts."""
        return {"slots": self.slots.bytes, "text": self.texts.bytes}

    def run(self, work: Work) -> None:
        """Do the work. A row that fails, fails alone; an error that ends the process (a lost device) is raised."""
        work.failed = self._non_finite()
        lost = [row for row, _ in work.failed]
        rows = [row for row in work.rows if row not in lost]
        family = self._pool.family(work.key.model)
        if family and work.phase == "profile" and self._costs.recall(family, work.key):
            return
        leased: list[Component] = []  # for a denoise: its rows lease the network themselves
        if work.phase != "denoise":
            leased = self._pool.components(work.key.model, "denoise" if work.phase == "profile" else work.phase)
        if family is None or not self._pool.lease(leased):
            work.idle = True
            return
        try:
            with torch.inference_mode():
                self._compute(family, work, rows)
        finally:
            self._pool.release(leased)
        work.text_hits, work.text_misses = self.texts.count()

    def _compute(self, family: Family, work: Work, rows: list[Row]) -> None:
        if work.phase == "profile":
            where = f"the first forward of {work.key.model}"
            work.error = attempt(lambda: self._costs.measure(family, work.key), where)
            return
        if self._adapts:
            self._cores = self._cores or Cores(torch.get_num_threads())
            self._cores.adapt()
        isolate({"encode": self.encode, "denoise": self.denoise, "decode": self.decode}[work.phase], rows, work)

    def preview(self, rows: list[Row]) -> list[tuple[Row, np.ndarray]]:
        """The predicted clean images of running rows of one key, without those that failed."""
        work = Work("decode", rows[0].key, rows)
        with torch.inference_mode():
            isolate(self._preview, rows, work)
        return [(row, pixels) for row, pixels, _ in work.images]

    def hold(self, row: Row) -> None:
        """Lease the network for a started row, if it is there: from now to its last line it stays."""
        if row.lease is None:
            components = self._pool.components(row.key.model, "denoise")
            row.lease = components if self._pool.lease(components) else None

    def rest(self, row: Row) -> None:
        """Release the network of a row that has run its last line."""
        if row.lease is not None:
            self._pool.release(row.lease)
            row.lease = None

    def release(self, row: Row) -> None:
        """Release the network and the slot of a row, if it has them."""
        self.rest(row)
        if row.slot >= 0:
            self.slots[row.key].release(row.slot)
            row.slot = -1

    def encode(self, rows: list[Row], work: Work) -> None:
        """Encode the rows' conditions, and give each row its slot."""
        family = self._family(work.key.model)
        batch = family.card.bucket.encode if self._deterministic else None
        encoded = encode_rows(family, rows, batch, self.texts)
        for row, conditions in zip(rows, encoded, strict=True):
            if row.slot < 0:  # else placed by an attempt that failed at a later row
                self._place(family, row, conditions)

    def _place(self, family: Family, row: Row, conditions: Conditions) -> None:
        """Give the row its table, first noise and slot. Noise is from a CPU generator: one seed, any device."""
        recipe, caps = row.request.recipe, self._costs.caps[row.key]
        shape = family.latent_shape(recipe.width, recipe.height)
        tokens = family.image_tokens(recipe.width, recipe.height)
        table = compile_table(family.card.schedule, recipe.sampler, recipe.steps, tokens=tokens)
        dice = torch.Generator("cpu").manual_seed(row.seed)
        first = torch.randn((1, *shape), generator=dice)[0] * table.init
        slots = self.slots.open(row.key, caps.bytes, caps.slots, shape, family.device)
        cuts = [family.truncated(one, row.key.text_length, self.texts.cut) for one in conditions_of(family, row)]
        row.warnings = tuple(
            f'the {name} is too long for the text encoder; not seen: "{cut}"'
            for name, cut in zip(("prompt", "negative prompt"), cuts, strict=False)
            if cut
        )
        row.slot = slots.take(plan_of(table, recipe.guidance, row.skipping), first, conditions, dice)

    def denoise(self, rows: list[Row], work: Work) -> None:
        """Run the next line of the rows' tables, in one forward."""
        family, slots = self._family(work.key.model), self.slots[work.key]
        rows = sorted(rows, key=lambda row: row.slot)  # the same rows in the same order, whoever is first to leave
        index = _slots_of(rows)
        slots.line[index] = [row.line for row in rows]
        slots.draw(index)
        passes = sum(row.passes for row in rows)
        bucket = family.card.bucket.passes if self._deterministic else None
        width = bucket or passes
        with self._costs.timing(work.key, width, family.device):
            self._unread.append((rows, denoise_step(family, slots, index, bucket)[: len(rows)]))
        work.padding += width - passes

    def decode(self, rows: list[Row], work: Work) -> None:
        """Decode the rows' latents into the images of the work."""
        family, slots, index = self._family(work.key.model), self.slots[work.key], _slots_of(rows)
        if self._deterministic:
            missing = max(0, family.card.bucket.decode - len(rows))
            index = np.concatenate([index, np.full(missing, index[0])])
        latents = slots.x[torch.from_numpy(index).to(slots.x.device)]
        pixels = family.decode(latents)[: len(rows)].cpu().numpy()
        for place, row in enumerate(rows):
            kept = latents[place].cpu().numpy() if row.request.delivery.keep_latents else None
            work.images.append((row, pixels[place], kept))

    def _preview(self, rows: list[Row], work: Work) -> None:
        family, slots = self._family(work.key.model), self.slots[work.key]
        latents = slots.mem[torch.from_numpy(_slots_of(rows)).to(slots.mem.device)]
        pixels = family.preview(latents).cpu().numpy()
        work.images.extend((row, pixels[place], None) for place, row in enumerate(rows))

    def _non_finite(self) -> list[tuple[Row, InstepError]]:
        """Rows whose latent the last step left not finite; read one step late, so that no step waits for it."""
        unread, self._unread = self._unread, []
        message = "the network gave a number that is not finite"
        return [
            (row, EngineError(message, code="non_finite_output"))
            for rows, sums in unread
            for row, total in zip(rows, sums.tolist(), strict=True)
            if not math.isfinite(total) and row.slot >= 0
        ]

    def _family(self, model: str) -> Family:
        family = self._pool.family(model)
        if family is None:
            raise EngineError("the model is gone")
        return family


def _slots_of(rows: list[Row]) -> np.ndarray:
    return np.array([row.slot for row in rows], np.int64)


class Cores:
    """Keeps the calling thread's number of torch threads at what other processes leave free.

    OpenMP's threads spin where they wait for each other. If one shares its core with another process, all spin until it
    has had its turn: on 2 cores an image took 4 times as long beside one busy process, and 1.3 times with one thread
    less (`python -m tests.bench.neighbours`). Processes with a niceness above 0 give way by themselves, and do not
    count while this one has none.

    most: the threads where nobody else computes. clock: seconds. used: processor seconds of this process.
    """

    def __init__(
        self,
        most: int,
        clock: Callable[[], float] = time.monotonic,
        used: Callable[[], float] = time.process_time,
        stat: Path = _STAT,
    ) -> None:
        self.threads = self._most = most
        self._clock, self._used, self._stat = clock, used, stat
        self._last = self._look()

    def adapt(self) -> None:
        """Look at the other processes, if the last look is long enough ago, and set the number of threads."""
        if self._last is None or self._clock() - self._last[0] < LOOK:
            return
        before, self._last = self._last, self._look()
        if self._last is None:
            return
        seconds, all_used, own = (now - then for now, then in zip(self._last, before, strict=True))
        others = (all_used - own) / seconds
        free = len(os.sched_getaffinity(0)) - max(0, math.ceil(others - SLACK))
        threads = max(1, min(self._most, free))
        if threads != self.threads:
            self.threads = threads
            use_threads(threads)

    def _look(self) -> tuple[float, float, float] | None:
        """Seconds on the clock, of all processes on our cores, and of this one; None where the system does not say."""
        try:
            lines = self._stat.read_text().splitlines()
            ours = {f"cpu{core}" for core in os.sched_getaffinity(0)}
            niced = os.nice(0) > 0
            busy = sum(_ticks(line, niced) for line in lines if line.partition(" ")[0] in ours)
            return self._clock(), busy / os.sysconf("SC_CLK_TCK"), self._used()
        except (OSError, AttributeError, ValueError, IndexError):
            return None


def _ticks(line: str, niced: bool) -> int:
    """The busy time of a core in a line of /proc/stat, with what the hypervisor gave to others.

    niced: count processes with a niceness above 0 too.
    """
    user, nice, system, _, _, irq, softirq, steal, *_ = map(int, line.split()[1:])
    return user + system + irq + softirq + steal + (nice if niced else 0)
