"""Runner: computes a Work on the device: rows into slots, their steps, latents to pixels.

SlotPool: how many bytes the slots of all keys may take.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from weakref import WeakValueDictionary

import numpy as np
import torch

from app.engine.costs import Costs
from app.engine.row import Row, Work
from app.engine.step import LINE, SKIP, Slots, Start, denoise_step
from app.errors import EngineError, InstepError, OutOfMemory
from app.families.adapters import Used
from app.families.base import Conditions, Family
from app.families.text import TextCache
from app.pool.budget import Cores
from app.pool.memory import Component
from app.pool.pool import Pool
from app.report import Phase
from app.request import Guidance, Key
from app.samplers.table import COLUMNS, Table

ALONE = "this image alone does not fit in the device's memory"

IDLE_KEYS = 4
"""Keys without rows whose slots stay allocated, so that the next request of that size finds them."""

POOL_BYTES = 1 << 30
"""Most bytes that the slots of all keys take together."""

PARTS: dict[str, Phase] = {"profile": "denoise", "source": "decode", "encode": "encode", "decode": "decode"}
"""The phases whose components a work leases; the rows of a denoise lease the network themselves."""

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


def encode_rows(
    family: Family, rows: list[Row], batch: int | None, texts: TextCache, used: Used = ()
) -> list[Conditions]:
    """The conditions of each of these rows of one key, [1 or 2, ...] by name, in the order of `Family.passes`.

    Texts that are not cached are encoded, in one batch for each encoder; the encoders must be on the device.
    batch: as `Family.encode`. used: the adapters of the texts of all rows.
    """
    wanted = [family.passes(row.condition, row.request.recipe) for row in rows]
    places = {one: place for place, one in enumerate(dict.fromkeys(one for both in wanted for one in both))}
    encoded = family.encode(list(places), rows[0].key.text_length, batch, partial(texts.read, family.card.id, used))
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


def start_of(row: Row, table: Table, shape: tuple[int, int, int]) -> Start:
    """Where a row starts, on the host. Noise is from a CPU generator: one seed, any device.

    It draws what diffusers' pipelines draw, in their order. A masked row of strength 1 starts from noise alone
    (pipeline_stable_diffusion_3_inpaint.py, `prepare_latents`), others from source and noise. NOTE: a latent is new
    where the mask has any of its pixels; the pipelines ask the first one alone, and leave up to 7 masked pixels old.
    """
    size, recipe, source = (1, *shape), row.request.recipe, row.request.source
    dice = torch.Generator("cpu").manual_seed(row.seed)
    if source is None:
        return Start(table.init * torch.randn(size, generator=dice)[0], dice)
    assert row.posterior is not None
    mean, deviation = row.posterior
    latent = mean + deviation * torch.randn(size, generator=dice)[0]
    noise = torch.randn(size, generator=dice)[0]
    (alpha, sigma), kept = table.start, None
    if source.mask:
        torch.randn(size, generator=dice)  # that of the masked picture, which these networks do not take
        new = torch.frombuffer(bytearray(source.mask), dtype=torch.uint8) > 0
        cells = new.view(shape[1], recipe.height // shape[1], shape[2], recipe.width // shape[2])
        kept = latent, noise, cells.any(3).any(1)
        alpha, sigma = (0.0, table.init) if recipe.strength == 1 else table.start
    return Start(alpha * latent + sigma * noise, dice, kept)


class SlotPool:
    """The slots of all keys of one device, within a budget of bytes."""

    def __init__(self, budget: int = POOL_BYTES) -> None:
        self._budget = budget
        self.by_key: dict[Key, Slots] = {}

    def __getitem__(self, key: Key) -> Slots:
        return self.by_key[key]

    @property
    def bytes(self) -> int:
        return sum(slots.bytes for slots in self.by_key.values())

    def has_room(self, key: Key, size: int) -> bool:
        """Whether slots of `size` bytes can be opened; a key is never refused while no other has rows."""
        if key in self.by_key:
            return True
        used = sum(slots.bytes for slots in self.by_key.values() if not slots.idle)
        return used == 0 or used + size <= self._budget

    def open(self, key: Key, size: int, capacity: int, shape: Sequence[int], device: torch.device) -> Slots:
        """The key's slots, made on first need with so many bytes; the longest unused slots without rows make room."""
        slots = self.by_key.pop(key, None)
        if slots is None:
            self._close_idle(size)
            slots = Slots(capacity, shape, device, size)
        self.by_key[key] = slots
        return slots

    def forget(self, model: str) -> None:
        """Close the slots of this model that have no rows."""
        for key in [key for key, slots in self.by_key.items() if key.model == model and slots.idle]:
            del self.by_key[key]

    def _close_idle(self, size: int) -> None:
        idle = [key for key, slots in self.by_key.items() if slots.idle]
        while idle and (len(idle) > IDLE_KEYS or self.bytes + size > self._budget):
            del self.by_key[idle.pop(0)]


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
        self._posteriors: WeakValueDictionary[tuple[Key, str], torch.Tensor] = WeakValueDictionary()
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
        leased: list[Component] = []
        if work.phase in PARTS:
            names = {name for row in rows for name in row.adapters}
            leased = self._pool.components(work.key.model, PARTS[work.phase], adapters=names)
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
        phases = {"source": self.source, "encode": self.encode, "denoise": self.denoise, "decode": self.decode}
        isolate(phases[work.phase], rows, work)

    def synchronize(self) -> None:
        """Wait until the device has done what it was asked to do. Raises its error, if there was one."""
        if self._pool.device.type == "cuda":
            torch.cuda.synchronize(self._pool.device)

    def preview(self, rows: list[Row]) -> list[tuple[Row, np.ndarray]]:
        """The predicted clean images of running rows of one key, without those that failed."""
        work = Work("decode", rows[0].key, rows)
        with torch.inference_mode():
            isolate(self._preview, rows, work)
        return [(row, pixels) for row, pixels, _ in work.images]

    def hold(self, row: Row) -> None:
        """Lease the network and the adapters of a started row, if they are there: to its last line they stay."""
        model, adapters = row.kit
        if row.lease is None and (not adapters or self._pool.resident(model, "denoise", adapters)):
            components = self._pool.components(model, "denoise", adapters=adapters)
            row.lease = components if self._pool.lease(components) else None
            if row.lease is not None and adapters:
                self.slots[row.key].used[row.slot] = self._used(row)

    def rest(self, row: Row) -> None:
        """Release the network and the adapters of a row that has run its last line."""
        if row.lease is not None:
            self._pool.release(row.lease)
            row.lease = None
            self.slots[row.key].gathered = None  # it has tensors of the adapters, which may leave now

    def release(self, row: Row) -> None:
        """Release the network and the slot of a row, if it has them."""
        self.rest(row)
        if row.slot >= 0:
            self.slots[row.key].release(row.slot)
            row.slot = -1

    def part(self, row: Row) -> InstepError | None:
        """Copy what a row takes into its next leg, and release everything it holds of the model of the last one.

        Returns the error if there is no memory for the copies; then nothing is released.
        """

        def copy() -> None:
            row.start = self.slots[row.key].start(row.slot)

        if error := attempt(copy, "the switch"):
            return error
        self.release(row)
        return None

    def source(self, rows: list[Row], work: Work) -> None:
        """Encode the pictures that the rows start from, each once, for as long as a row needs it."""
        family, key = self._family(work.key.model), work.key
        asked = {(key, row.request.recipe.source): row.request.source for row in rows}
        fresh = {name: one.pixels for name, one in asked.items() if one and name not in self._posteriors}
        if pixels := list(fresh.values()):
            if self._deterministic:
                pixels += pixels[:1] * (family.card.bucket.decode - len(pixels))
            images = torch.frombuffer(bytearray().join(pixels), dtype=torch.uint8).view(-1, key.height, key.width, 3)
            new = dict(zip(fresh, family.posterior(images).cpu(), strict=False))  # the rest is padding
            self._posteriors.update(new)
        for row in rows:
            row.posterior = self._posteriors[key, row.request.recipe.source]

    def encode(self, rows: list[Row], work: Work) -> None:
        """Encode the rows' conditions, and give each row its slot."""
        family, groups = self._family(work.key.model), dict[Used, list[Row]]()
        batch = family.card.bucket.encode if self._deterministic else None
        for row in rows:
            used = tuple(one for one in self._used(row) if one[0].places.keys() - {family.network})
            groups.setdefault(used, []).append(row)
        for used, group in groups.items():
            encoded = encode_rows(family, group, batch, self.texts, used)
            for row, conditions in zip(group, encoded, strict=True):
                if row.slot < 0:  # else placed by an attempt that failed at a later row
                    self._place(family, row, conditions)

    def _used(self, row: Row) -> Used:
        adapters = row.request.recipe.adapters if row.adapters else ()
        return tuple((self._pool.adapter(row.key.model, name), weight) for name, weight in adapters)

    def _place(self, family: Family, row: Row, conditions: Conditions) -> None:
        """Give the row the table of its leg, its start and a slot."""
        recipe, caps = row.request.recipe, self._costs.caps[row.key]
        shape = family.latent_shape(recipe.width, recipe.height)
        tokens = family.image_tokens(recipe.width, recipe.height)
        table = self._pool.cards[recipe.model].legs(recipe, tokens)[row.key.model]
        start = row.start or start_of(row, table, shape)
        slots = self.slots.open(row.key, caps.bytes, caps.slots, shape, family.device)
        passes = family.passes(row.condition, recipe)
        cuts = [family.truncated(one.condition, row.key.text_length, self.texts.cut) for one in passes]
        warnings = (
            f'the {name} is too long for the text encoder; not seen: "{cut}"'
            for name, cut in zip(("prompt", "negative prompt"), cuts, strict=False)
            if cut
        )
        skipping = range(*(max(0, line - row.begins) for line in (row.skipping.start, row.skipping.stop)))
        plan = plan_of(table, recipe.guidance, skipping)
        row.slot = slots.take(plan, start.x, conditions, start.dice, start.kept)
        row.start, row.warnings = None, tuple(dict.fromkeys((*row.warnings, *warnings)))

    def denoise(self, rows: list[Row], work: Work) -> None:
        """Run the next line of the rows' tables, in one forward."""
        family, slots = self._family(work.key.model), self.slots[work.key]
        # The same rows in the same order, whoever is first to leave; those with the same adapters side by side.
        rows = sorted(rows, key=lambda row: (row.adapters, row.slot))
        index = _slots_of(rows)
        slots.line[index] = [row.line - row.begins for row in rows]
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
        pixels = family.preview(slots.clean(_slots_of(rows))).cpu().numpy()
        work.images.extend((row, pixels[place], None) for place, row in enumerate(rows))

    def _non_finite(self) -> list[tuple[Row, InstepError]]:
        """Rows whose latent the last step left not finite; read one step late, so that no step waits for it."""
        unread, self._unread = self._unread, []
        message = "the network gave a number that is not finite"
        return [
            (row, EngineError(message, code="non_finite_output"))
            for rows, sums in unread
            for row, total in zip(rows, sums.tolist(), strict=True)
            if not math.isfinite(total) and row.stage != "gone"
        ]

    def _family(self, model: str) -> Family:
        family = self._pool.family(model)
        if family is None:
            raise EngineError("the model is gone")
        return family


def _slots_of(rows: list[Row]) -> np.ndarray:
    return np.array([row.slot for row in rows], np.int64)
