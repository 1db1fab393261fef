"""Backlog: the images that one worker has not answered yet, whose they are, and what they will take of its device.

Knows nothing of processes, and of a request only what decides its cost.
"""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

from app.cards.card import Card
from app.request import Request
from app.samplers.table import compile_table
from app.worker.costs import Costs


class Kind(NamedTuple):
    """What images of equal cost have in common. passes: through the network, of one image."""

    tenant: str
    model: str
    width: int
    height: int
    passes: int


def kind_of(request: Request, card: Card) -> Kind:
    """The kind of a request's images. Raises InvalidValue for a sampler or steps that the schedule does not have."""
    # The engine compiles the same table, for the image's own number of tokens.
    recipe = request.recipe
    lines = compile_table(card.schedule, recipe.sampler, recipe.steps, tokens=1).lines
    return Kind(request.delivery.tenant, recipe.model, recipe.width, recipe.height, recipe.passes(lines))


class Backlog:
    """Whole numbers of images by kind: a sum over kinds is exact and cheap, however many requests there are.

    NOTE: an image counts whole until it is answered. What of it is done is known to the engine alone; leaving it out
    overstates the queue by at most what is in the slots, which is little beside a queue that is worth a refusal.
    """

    def __init__(self, costs: Costs) -> None:
        self._costs = costs
        self._images: Counter[Kind] = Counter()
        self._weights: dict[str, float] = {}

    def add(self, kind: Kind, images: int, weight: float) -> None:
        """So many more images; weight: of their tenant, the one told last holds."""
        self._images[kind] += images
        self._weights[kind.tenant] = weight

    def drop(self, kind: Kind, images: int) -> None:
        """So many fewer: answered, failed or cancelled."""
        self._images[kind] -= images
        if not self._images[kind]:
            del self._images[kind]
            if not any(other.tenant == kind.tenant for other in self._images):
                del self._weights[kind.tenant]

    @property
    def weights(self) -> dict[str, float]:
        """Of the tenants that have images here."""
        return self._weights

    @property
    def images(self) -> int:
        return self._images.total()

    def images_of(self, model: str) -> int:
        return sum(images for kind, images in self._images.items() if kind.model == model)

    @property
    def seconds(self) -> float:
        """Device seconds of everything."""
        return sum(self.tenants().values())

    def image(self, kind: Kind) -> float:
        """Device seconds of one image of this kind."""
        return self._costs.image(*kind[1:])

    def measured(self, model: str) -> bool:
        """Whether the seconds of this model are more than a guess."""
        return self._costs.measured(model)

    def tenants(self) -> dict[str, float]:
        """Device seconds by tenant."""
        seconds: dict[str, float] = dict.fromkeys(self._weights, 0.0)
        for kind, images in self._images.items():
            seconds[kind.tenant] += images * self.image(kind)
        return seconds

    def before(self, kind: Kind) -> float:
        """Device seconds of the tenant's own images that take no longer than one of this kind, and so go first."""
        own = self.image(kind)
        same = ((other, images) for other, images in self._images.items() if other.tenant == kind.tenant)
        return sum(images * each for other, images in same if (each := self.image(other)) <= own)

    def wait(self, tenant: str, weight: float, own: float) -> float:
        """Seconds until the device has worked `own` seconds for this tenant.

        Meanwhile every other tenant has its share, weight by weight, or all of its work where that is less: the
        batcher's deficit round robin with turns too short to see.
        """
        others = ((name, seconds) for name, seconds in self.tenants().items() if name != tenant)
        return own + sum(min(seconds, own * self._weights[name] / weight) for name, seconds in others)
