"""Runner: computes a Work on the device. Encodes rows into slots, runs their steps, decodes their latents."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch

from app.engine.limits import Capacity
from app.engine.profile import Profiles
from app.engine.row import Caps, Image, Outcome, Row, Work
from app.engine.slots import SlotPool, Slots
from app.engine.step import denoise_step, gather
from app.engine.text_cache import TextCache
from app.errors import EngineError, InstepError, OutOfMemory
from app.families.base import Conditions, Family
from app.pool.budget import Cores
from app.pool.pool import Pool
from app.request import Key
from app.samplers.table import compile_table

ALONE = "this image alone does not fit in the device's memory"

Compute = Callable[[list[Row], Outcome], None]
"""What one phase does for rows."""


def isolate(phase: Compute, rows: list[Row], outcome: Outcome) -> None:
    """Run a phase; when it raises (out of memory too), halve the rows and run each half again, until one row fails
    alone. Phases change nothing before they succeed."""
    if not rows:
        return
    error = attempt(lambda: phase(rows, outcome), phase.__name__.strip("_"))
    if error is None:
        return
    outcome.out_of_memory += isinstance(error, OutOfMemory)
    if len(rows) == 1:
        outcome.failed.append((rows[0], error))
        return
    middle = len(rows) // 2
    isolate(phase, rows[:middle], outcome)
    isolate(phase, rows[middle:], outcome)


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


class Runner:
    """The device's side of the engine: slots by key, cached conditions, and the phases.

    deterministic: every phase is padded to the card's bucket, so that a row's bits do not depend on its neighbours.
    """

    def __init__(
        self, pool: Pool, profiles: Profiles, deterministic: bool, text_bytes: int, adapts: bool = True
    ) -> None:
        """text_bytes: of the device, for the cache of encoded prompts. adapts: leave cores to other processes, except
        in deterministic mode, where the number of threads decides bits."""
        self._pool = pool
        self._deterministic = deterministic
        self._slots = SlotPool()
        self.capacity = Capacity(pool, profiles, deterministic)
        self._texts = TextCache(text_bytes, pool.version)
        self._unread: list[tuple[list[Row], torch.Tensor]] = []
        self._cores: Cores | None = None
        self._adapts = adapts and not deterministic and pool.device.type == "cpu"

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes of the device in use here, by kind: the slots of all keys, and encoded prompts."""
        return {"slots": self._slots.bytes, "text": self._texts.bytes}

    def caps(self, key: Key) -> Caps | None:
        """The caps of a key, with no slots while those of other keys leave no room; None before it is measured."""
        caps = self.capacity.caps(key)
        return caps if caps is None or self._slots.has_room(key, caps.bytes) else replace(caps, slots=0)

    def tidy(self, model: str) -> None:
        """Free what is kept for a model that is off the device: its encoded prompts, and slots without rows."""
        self._texts.forget(model)
        self._slots.forget(model)

    def forget(self, model: str) -> None:
        """Drop also what was learned of a model, whose files may be others when it comes back."""
        self.tidy(model)
        self.capacity.forget(model)

    def run(self, work: Work) -> Outcome:
        """Do the work. A row that fails, fails alone; an error that ends the process (a lost device) is raised."""
        if work.phase == "profile":
            where = f"the first forward of {work.key.model}"
            return Outcome(error=attempt(lambda: self.capacity.measure(work.key), where))
        if self._adapts:
            self._cores = self._cores or Cores(torch.get_num_threads())
            self._cores.adapt()
        phases = {"encode": self._encode, "denoise": self._denoise, "decode": self._decode}
        outcome = Outcome(failed=self._non_finite())
        lost = {id(row) for row, _ in outcome.failed}
        rows = [row for row in work.rows if id(row) not in lost]
        leases = rows and work.phase != "denoise"  # rows lease the network themselves
        lease = self._pool.lease(work.key.model, work.phase) if leases else None
        outcome.idle = bool(leases and not lease)  # the rows wait on
        try:
            with torch.inference_mode():
                isolate(phases[work.phase], [] if outcome.idle else rows, outcome)
        finally:
            if lease:
                lease.release()
        outcome.text_hits, outcome.text_misses = self._texts.count()
        return outcome

    def preview(self, rows: list[Row]) -> Outcome:
        """The predicted clean images of running rows of one key, as `Outcome.images`."""
        outcome = Outcome()
        with torch.inference_mode():
            isolate(self._preview, rows, outcome)
        return outcome

    def hold(self, row: Row) -> None:
        """Lease the network for a started row, if it is there: from now to its last line it stays."""
        if row.lease is None:
            row.lease = self._pool.lease(row.key.model, "denoise")

    def rest(self, row: Row) -> None:
        """Release the network of a row that has run its last line."""
        if row.lease is not None:
            row.lease.release()
            row.lease = None

    def release(self, row: Row) -> None:
        """Release the network and the slot of a row, if it has them."""
        self.rest(row)
        if row.slot >= 0:
            self._slots[row.key].release(row.slot)
            row.slot = -1
            row.noise = None

    def _encode(self, rows: list[Row], outcome: Outcome) -> None:
        family = self._family(rows[0])
        batch = family.card.bucket.encode if self._deterministic else None
        encoded = self._texts.encode(family, rows, batch)
        for row, conditions in zip(rows, encoded, strict=True):
            if row.slot < 0:  # else placed by an attempt that failed at a later row
                self._place(family, row, conditions)

    def _place(self, family: Family, row: Row, conditions: Conditions) -> None:
        """Give the row its table, first noise and slot. Noise is from a CPU generator: one seed, any device."""
        recipe = row.request.recipe
        shape = family.latent_shape(recipe.width, recipe.height)
        tokens = family.image_tokens(recipe.width, recipe.height)
        table = compile_table(family.card.schedule, recipe.sampler, recipe.steps, tokens=tokens)
        row.noise = torch.Generator("cpu").manual_seed(row.seed)
        row.noisy = set(np.flatnonzero(table.xz).tolist())
        first = torch.randn((1, *shape), generator=row.noise)[0] * table.init
        caps = self.capacity.known[row.key]
        slots = self._slots.open(row.key, caps.bytes, caps.slots, shape, family.device)
        cuts = zip(("prompt", "negative prompt"), self._texts.cuts(family, row), strict=False)
        row.warnings = tuple(f'the {it} is too long for the text encoder; not seen: "{cut}"' for it, cut in cuts if cut)
        row.slot = slots.take(table, first, conditions, recipe.guidance, row.skipping)

    def _denoise(self, rows: list[Row], outcome: Outcome) -> None:
        family, slots = self._of(rows[0])
        rows = sorted(rows, key=lambda row: row.slot)  # the same rows in the same order, whoever is first to leave
        self._draw(rows, slots)
        index = np.array([row.slot for row in rows], np.int64)
        plan = gather(slots, index, family.card.bucket.passes if self._deterministic else None)
        with self.capacity.timing(rows[0].key, len(plan.owner)):
            self._unread.append((rows, denoise_step(family, slots, plan)[: len(rows)]))
        slots.line[index] += 1
        outcome.padding += plan.padding

    @staticmethod
    def _draw(rows: list[Row], slots: Slots) -> None:
        """Draw step noise for the rows whose line adds some, once a line: a replayed step must see the same noise."""
        due = [row for row in rows if row.line in row.noisy]
        if not due:
            return
        drawn = [torch.randn((1, *slots.noise.shape[1:]), generator=row.noise) for row in due]
        index = torch.tensor([row.slot for row in due], device=slots.noise.device)
        slots.noise.index_copy_(0, index, torch.cat(drawn).to(slots.noise.device))
        for row in due:
            row.noisy.discard(row.line)

    def _decode(self, rows: list[Row], outcome: Outcome) -> None:
        family, slots = self._of(rows[0])
        index = np.array([row.slot for row in rows], np.int64)
        if self._deterministic:
            missing = max(0, family.card.bucket.decode - len(rows))
            index = np.concatenate([index, np.full(missing, index[0])])
        latents = slots.x[torch.from_numpy(index).to(slots.x.device)]
        pixels = family.decode(latents)[: len(rows)].cpu().numpy()
        for place, row in enumerate(rows):
            kept = latents[place].cpu().numpy() if row.request.delivery.keep_latents else None
            outcome.images.append(Image(row, pixels[place], kept))

    def _preview(self, rows: list[Row], outcome: Outcome) -> None:
        family, slots = self._of(rows[0])
        index = torch.tensor([row.slot for row in rows], device=slots.mem.device)
        pixels = family.preview(slots.mem[index]).cpu().numpy()
        outcome.images.extend(Image(row, pixels[place], None) for place, row in enumerate(rows))

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

    def _of(self, row: Row) -> tuple[Family, Slots]:
        return self._family(row), self._slots[row.key]

    def _family(self, row: Row) -> Family:
        family = self._pool.family(row.key.model)
        if family is None:
            raise EngineError("the model is gone")
        return family
