"""Runner: computes a Work on the device. Encodes rows into slots, runs their steps, decodes their latents.

Knows nothing of order, of requests' other rows, or of who waits for the result.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from app.engine.encodings import Encodings
from app.engine.profile import Profiles, caps_of, plain_conditions
from app.engine.row import Caps, Key, Row, Work
from app.engine.slots import PASSES, Slots, Space
from app.engine.step import denoise_step, gather
from app.errors import EngineError, InstepError, NonFiniteOutput, OutOfMemory
from app.families.base import Family
from app.pool.pool import Pool
from app.samplers.table import compile_table


@dataclass(frozen=True, slots=True)
class Image:
    """A decoded row. pixels: uint8 [H, W, 3]; latents: float32 [C, h, w], when the request keeps them."""

    row: Row
    pixels: np.ndarray
    latents: np.ndarray | None


@dataclass(slots=True)
class Outcome:
    """What a Work came to: images that are done, rows that failed alone, and the padding passes it ran."""

    images: list[Image] = field(default_factory=list)
    failed: list[tuple[Row, InstepError]] = field(default_factory=list)
    padding: int = 0


class Runner:
    """The device's side of the engine: slots by key, cached conditions, and the three phases.

    deterministic: every forward, encode and decode is padded to the card's bucket, so that a row's bits do not
    depend on its neighbours.
    """

    def __init__(self, pool: Pool, profiles: Profiles, deterministic: bool) -> None:
        self._pool = pool
        self._profiles = profiles
        self._deterministic = deterministic
        self._space = Space()
        self._caps: dict[Key, Caps] = {}
        self._encodings = Encodings()
        self._unread: list[tuple[list[Row], torch.Tensor]] = []

    def measured(self, key: Key) -> bool:
        return key in self._caps

    def caps(self, key: Key) -> Caps | None:
        """The caps of a key; None before `measure`, and while the slots of other keys leave no room for its own."""
        caps = self._caps.get(key)
        return caps if caps and self._space.has_room(key, caps.bytes) else None

    def measure(self, key: Key, family: Family) -> Caps:
        """Find the caps of a key on this device, from its stored profile or by a short measurement.

        Raises EngineError: the first forward of this checkpoint fails.
        """
        try:
            with torch.inference_mode():
                seconds = self._profiles.seconds(family, key)
                conditions = plain_conditions(family, key.text_length)
            latent = family.latent_shape(key.width, key.height)
            bytes_ = 12 * math.prod(latent) + PASSES * sum(value.nbytes for value in conditions.values())
            self._caps[key] = caps_of(seconds, family.card, latent, bytes_, self._deterministic)
        except torch.AcceleratorError:
            raise
        except Exception as error:
            raise EngineError(f"{type(error).__name__} in the first forward of {key.model}") from None
        return self._caps[key]

    def run(self, work: Work) -> Outcome:
        """Do the work. A row that fails, fails alone; an error that ends the process (a lost device) is raised."""
        phases = {"encode": self._encode, "denoise": self._denoise, "decode": self._decode}
        outcome = Outcome(failed=self._non_finite())
        lost = {id(row) for row, _ in outcome.failed}
        rows = [row for row in work.rows if id(row) not in lost]
        with torch.inference_mode():
            self._isolate(phases[work.phase], rows, outcome)
        return outcome

    def preview(self, rows: list[Row]) -> Outcome:
        """The predicted clean images of running rows of one key, as `Outcome.images`."""
        outcome = Outcome()
        with torch.inference_mode():
            self._isolate(self._preview, rows, outcome)
        return outcome

    def release(self, row: Row) -> None:
        """Give back what a started row holds; nothing for a row that holds nothing."""
        if row.slot >= 0:
            self._space[row.key].release(row.slot)
            row.slot = -1
            row.noise = None
        if row.lease is not None:
            row.lease.release()
            row.lease = None

    def _isolate(self, phase: Callable[[list[Row], Outcome], None], rows: list[Row], outcome: Outcome) -> None:
        """Run a phase; when it raises, halve the rows and run each half again, until one row fails alone.

        This is also the split and retry of a step that is out of memory. Phases change nothing before they succeed.
        """
        if not rows:
            return
        error = _attempt(phase, rows, outcome)
        if error is None:
            return
        if len(rows) == 1:
            outcome.failed.append((rows[0], error))
            return
        middle = len(rows) // 2
        self._isolate(phase, rows[:middle], outcome)
        self._isolate(phase, rows[middle:], outcome)

    def _encode(self, rows: list[Row], outcome: Outcome) -> None:
        lease = self._pool.lease(rows[0].key.model)
        if lease is None:
            raise EngineError(f"the model {rows[0].key.model} left the device")
        family = lease.model
        lease.release()
        self._encodings.prepare(family, rows, family.card.bucket.encode if self._deterministic else None)
        for row in rows:
            if row.slot < 0:  # else placed by an attempt that failed at a later row
                self._place(family, row)

    def _place(self, family: Family, row: Row) -> None:
        """Give the row its table, first noise and slot. Noise is from a CPU generator: one seed, any device."""
        request = row.request
        shape = family.latent_shape(request.width, request.height)
        tokens = family.image_tokens(request.width, request.height)
        table = compile_table(family.card.schedule, request.sampler, request.steps, tokens=tokens)
        conditions = self._encodings.of(family, row)
        row.noise = torch.Generator("cpu").manual_seed(row.seed)
        row.noisy = set(np.flatnonzero(table.xz).tolist())
        first = torch.randn((1, *shape), generator=row.noise)[0] * table.init
        caps = self._caps[row.key]
        slots = self._space.open(row.key, caps.bytes, caps.slots, shape, family.device)
        cut = self._encodings.cut(family, row)
        row.warnings = (f'the prompt is too long for the text encoder; not seen: "{cut}"',) if cut else ()
        row.lease = row.lease or self._pool.lease(row.key.model)
        row.slot = slots.take(table, first, conditions, request.guidance if request.guided else None)

    def _denoise(self, rows: list[Row], outcome: Outcome) -> None:
        family, slots = self._of(rows[0])
        self._draw(rows, slots)
        index = np.array([row.slot for row in rows], np.int64)
        plan = gather(slots, index, family.card.bucket.passes if self._deterministic else None)
        finite = denoise_step(family, slots, plan)[: len(rows)]
        self._unread.append((rows, finite))
        slots.line[index] += 1
        outcome.padding += int((plan.places >= 2 * slots.spare).sum())

    @staticmethod
    def _draw(rows: list[Row], slots: Slots) -> None:
        """Step noise of the rows whose line adds some, once a line: a replayed step must see the same noise."""
        due = [row for row in rows if row.line in row.noisy]
        if not due:
            return
        drawn = [torch.randn((1, *slots.noise.shape[1:]), generator=row.noise) for row in due]
        index = torch.tensor([row.slot for row in due], device=slots.noise.device)
        slots.noise[index] = torch.cat(drawn).to(slots.noise.device)
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
            kept = latents[place].cpu().numpy() if row.request.keep_latents else None
            outcome.images.append(Image(row, pixels[place], kept))

    def _preview(self, rows: list[Row], outcome: Outcome) -> None:
        family, slots = self._of(rows[0])
        index = torch.tensor([row.slot for row in rows], device=slots.mem.device)
        pixels = family.preview(slots.mem[index]).cpu().numpy()
        outcome.images.extend(Image(row, pixels[place], None) for place, row in enumerate(rows))

    def _non_finite(self) -> list[tuple[Row, InstepError]]:
        """Rows whose latent the last step left not finite; read one step late, so that no step waits for it."""
        unread, self._unread = self._unread, []
        message = "the network produced a value that is not finite for this image"
        return [
            (row, NonFiniteOutput(message))
            for rows, finite in unread
            for row, fine in zip(rows, finite.tolist(), strict=True)
            if not fine and row.slot >= 0
        ]

    def _of(self, row: Row) -> tuple[Family, Slots]:
        if row.lease is None:
            raise EngineError("the row holds no model")
        return row.lease.model, self._space[row.key]


def _attempt(phase: Callable[[list[Row], Outcome], None], rows: list[Row], outcome: Outcome) -> InstepError | None:
    """The error of a phase, or None. Nothing of the exception outlives this call: its traceback holds tensors."""
    try:
        phase(rows, outcome)
    except torch.AcceleratorError:
        raise
    except torch.OutOfMemoryError:
        return OutOfMemory("this image alone does not fit in the device's memory")
    except InstepError as error:
        return type(error)(error.message, param=error.param, retry_after=error.retry_after)
    except (KeyboardInterrupt, SystemExit):
        raise
    except (
        BaseException
    ) as error:  # a poison row must not take its neighbours with it; tokenizers panic as BaseException
        return EngineError(f"{type(error).__name__} in {phase.__name__.strip('_')}")
    return None
