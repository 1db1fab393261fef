"""Runner: computes a Work on the device. Encodes rows into slots, runs their steps, decodes their latents.

Knows nothing of order, of requests' other rows, or of who waits for the result.
"""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import torch

from app.engine.encodings import Encodings
from app.engine.limits import Limits
from app.engine.outcome import Image, Outcome, isolate
from app.engine.profile import Profiles
from app.engine.row import Caps, Row, Work
from app.engine.slots import Slots, Space
from app.engine.step import denoise_step, gather
from app.errors import EngineError, InstepError, NonFiniteOutput
from app.families.base import Conditions, Family
from app.pool.budget import Cores
from app.pool.pool import Pool
from app.request import Key
from app.samplers.table import compile_table


class Runner:
    """The device's side of the engine: slots by key, cached conditions, and the three phases.

    deterministic: every forward, encode and decode is padded to the card's bucket, so that a row's bits do not
    depend on its neighbours.
    """

    def __init__(
        self, pool: Pool, profiles: Profiles, deterministic: bool, text_bytes: int, adapts: bool = True
    ) -> None:
        """text_bytes: of the device, for prompts that are encoded already. adapts: leave cores to other processes."""
        self._pool = pool
        self._deterministic = deterministic
        self._space = Space()
        self.limits = Limits(pool, profiles, deterministic)
        self._encodings = Encodings(text_bytes, pool.version)
        self._unread: list[tuple[list[Row], torch.Tensor]] = []
        self._cores: Cores | None = None
        self._adapts = adapts and not deterministic and pool.device.type == "cpu"

    @property
    def bytes(self) -> dict[str, int]:
        """Bytes of the device that are held here, by kind: the slots of all keys, and encoded prompts."""
        return {"slots": self._space.bytes, "text": self._encodings.bytes}

    def caps(self, key: Key) -> Caps | None:
        """The caps of a key, with no slots while those of other keys leave no room; None before it is measured."""
        caps = self.limits.caps(key)
        return caps if caps is None or self._space.has_room(key, caps.bytes) else replace(caps, slots=0)

    def tidy(self, model: str) -> None:
        """Give back what is kept for a model that is off the device: its encoded prompts, and slots without rows."""
        self._encodings.forget(model)
        self._space.forget(model)

    def forget(self, model: str) -> None:
        """Everything that was learned of a model whose files may be others when it comes back."""
        self.tidy(model)
        self.limits.forget(model)

    def run(self, work: Work) -> Outcome:
        """Do the work. A row that fails, fails alone; an error that ends the process (a lost device) is raised."""
        self._adapt()
        phases = {"encode": self._encode, "denoise": self._denoise, "decode": self._decode}
        outcome = Outcome(failed=self._non_finite())
        lost = {id(row) for row, _ in outcome.failed}
        rows = [row for row in work.rows if id(row) not in lost]
        with torch.inference_mode():
            isolate(phases[work.phase], rows, outcome)
        outcome.text_hits, outcome.text_misses = self._encodings.count()
        return outcome

    def _adapt(self) -> None:
        """Leave cores to other processes; not in deterministic mode, where the number of threads decides bits."""
        if self._adapts:
            self._cores = self._cores or Cores(torch.get_num_threads())
            self._cores.adapt()

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
        """The row needs the network no more."""
        if row.lease is not None:
            row.lease.release()
            row.lease = None

    def release(self, row: Row) -> None:
        """Give back what a started row holds; nothing for a row that holds nothing."""
        self.rest(row)
        if row.slot >= 0:
            self._space[row.key].release(row.slot)
            row.slot = -1
            row.noise = None

    def _encode(self, rows: list[Row], outcome: Outcome) -> None:
        lease = self._pool.lease(rows[0].key.model, "encode")
        if lease is None:
            outcome.idle = True  # the rows wait on
            return
        family = lease.model
        try:
            batch = family.card.bucket.encode if self._deterministic else None
            encoded = self._encodings.of(family, rows, batch)
        finally:
            lease.release()
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
        caps = self.limits.known[row.key]
        slots = self._space.open(row.key, caps.bytes, caps.slots, shape, family.device)
        cuts = zip(("prompt", "negative prompt"), self._encodings.cuts(family, row), strict=False)
        row.warnings = tuple(f'the {it} is too long for the text encoder; not seen: "{cut}"' for it, cut in cuts if cut)
        row.slot = slots.take(table, first, conditions, recipe.guidance, row.skipping)

    def _denoise(self, rows: list[Row], outcome: Outcome) -> None:
        family, slots = self._of(rows[0])
        rows = sorted(rows, key=lambda row: row.slot)  # the same rows in the same order, whoever is first to leave
        self._draw(rows, slots)
        index = np.array([row.slot for row in rows], np.int64)
        plan = gather(slots, index, family.card.bucket.passes if self._deterministic else None)
        with self.limits.timing(rows[0].key, len(plan.owner)):
            self._unread.append((rows, denoise_step(family, slots, plan)[: len(rows)]))
        slots.line[index] += 1
        outcome.padding += plan.padding

    @staticmethod
    def _draw(rows: list[Row], slots: Slots) -> None:
        """Step noise of the rows whose line adds some, once a line: a replayed step must see the same noise."""
        due = [row for row in rows if row.line in row.noisy]
        if not due:
            return
        drawn = [torch.randn((1, *slots.noise.shape[1:]), generator=row.noise) for row in due]
        index = torch.tensor([row.slot for row in due], device=slots.noise.device)
        slots.noise.index_copy_(0, index, torch.cat(drawn).to(slots.noise.device))
        for row in due:
            row.noisy.discard(row.line)

    def _decode(self, rows: list[Row], outcome: Outcome) -> None:
        lease = self._pool.lease(rows[0].key.model, "decode")
        if lease is None:
            outcome.idle = True
            return
        family, slots = lease.model, self._space[rows[0].key]
        try:
            index = np.array([row.slot for row in rows], np.int64)
            if self._deterministic:
                missing = max(0, family.card.bucket.decode - len(rows))
                index = np.concatenate([index, np.full(missing, index[0])])
            latents = slots.x[torch.from_numpy(index).to(slots.x.device)]
            pixels = family.decode(latents)[: len(rows)].cpu().numpy()
        finally:
            lease.release()
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
            (row, NonFiniteOutput(message))
            for rows, sums in unread
            for row, total in zip(rows, sums.tolist(), strict=True)
            if not math.isfinite(total) and row.slot >= 0
        ]

    def _of(self, row: Row) -> tuple[Family, Slots]:
        family = self._pool.family(row.key.model)
        if family is None:
            raise EngineError("the model is gone")
        return family, self._space[row.key]
