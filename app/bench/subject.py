"""Subject: what is measured: one card's model, loaded on the first device that the settings name.

Knows nothing of what is measured of it.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from app.bench.weights import write_random
from app.cards.card import Card, read_cards
from app.cards.catalog import Registry
from app.engine.engine import Engine
from app.errors import CheckpointError, DoesNotFit
from app.families.base import Family
from app.pool.pool import Pool
from app.report import Report
from app.settings import Settings
from app.worker import plan
from app.worker.process import build, resolve_dtype
from app.worker.wire import Start


@dataclass(frozen=True)
class Subject:
    """A loaded model: its card, its family with all weights there, and an engine that turns when it is told to.

    reports: what the engine told, in order.
    """

    settings: Settings
    card: Card
    family: Family
    pool: Pool
    engine: Engine
    reports: list[Report]


@contextmanager
def loaded(settings: Settings, model: str | None, *, random_weights: bool = False) -> Iterator[Subject]:
    """Load the card of this name and give the memory back at the end. Raises InstepError: no such card, or no files."""
    cards: dict[str, Card] = read_cards(settings.models, settings.alias)
    card = Registry(cards, settings).find(model)
    device = plan.devices(settings.devices)[0]
    with tempfile.TemporaryDirectory(prefix="instep-bench-") as folder:
        if random_weights:
            card = write_random(card, cards, Path(folder), resolve_dtype(settings, device))
            cards = {card.id: card}
        reports: list[Report] = []
        pool, engine = build(Start(settings, cards, device), reports.append)
        try:
            family = _whole(pool, card)
            yield Subject(settings, card, family, pool, engine, reports)
        finally:
            pool.close()


def _whole(pool: Pool, card: Card) -> Family:
    """The family, when all of its parts have come."""
    pool.want(card.id)
    while not all(pool.resident(card.id, phase) for phase in ("encode", "denoise", "decode")):
        if error := pool.failure(card.id):
            raise error
        if pool.family(card.id) is not None and not pool.fits(card.id):
            raise DoesNotFit(f"{card.id}: its parts do not fit the device together (INSTEP_DEVICE_MEMORY)")
        time.sleep(0.01)
    family = pool.family(card.id)
    if family is None:
        raise CheckpointError(f"{card.id}: gone while it loaded")
    return family
