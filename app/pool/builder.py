"""Builder: models and adapters without their weights, from configs and headers; one Component for equal parts."""

import threading
from collections.abc import Hashable, Mapping

import torch

from app.cards.card import Card
from app.cards.folder import Part
from app.checkpoints.adapters import may_change
from app.checkpoints.parts import build_family, part_dtype, part_identity, part_outline, part_stamp, read_parts
from app.errors import LoadError
from app.families import FAMILIES
from app.families.base import Family
from app.families.compiling import compile_blocks
from app.families.components import has_weights
from app.pool.memory import AdapterComponent, Component
from app.pool.policy import Model, Policy


class Builder:
    """What the pool's loader builds with; all components are the policy's."""

    def __init__(
        self, policy: Policy, lock: threading.Condition, device: torch.device, dtype: torch.dtype, compiled: bool
    ) -> None:
        """lock: of the pool. compiled: networks compile their blocks."""
        self._policy, self._lock, self._compiled = policy, lock, compiled
        self._device, self._dtype = device, dtype

    def model(self, card: Card, cards: Mapping[str, Card]) -> tuple[Family, dict[str, Component]]:
        """Find the parts of a card, check their headers and configs, build them. Raises CheckpointError."""
        found = read_parts(card, cards)
        # Networks before tokenizers, which take longest to read, so that files that lie are refused at once.
        found.sort(key=lambda part: (not has_weights(part.class_name), part.name not in FAMILIES[card.family].required))
        for part in found:
            if has_weights(part.class_name):
                part_outline(part)
        parts = {part.name: self._component(card, part) for part in found}
        family = build_family(card, {name: one.value for name, one in parts.items()}, self._device, self._dtype)
        if self._compiled:
            compile_blocks(family.network)
        return family, parts

    def adapter(self, card: Card, model: Model, name: str) -> None:
        """Build an adapter for the networks of a model. Raises LoadError."""
        if name not in card.adapters:
            raise LoadError(f"{name}: the adapter is gone")
        networks = {part: one.value for part, one in model.parts.items() if may_change(card, part)}
        one = AdapterComponent(card.adapters[name], networks, self._device, self._dtype)
        one.owners.add(card.id)
        with self._lock:
            self._policy.components.append(one)
            model.adapters[name] = one

    def key(self, card: Card, part: Part) -> Hashable:
        """What two parts must have in common to be one component."""
        dtype = part_dtype(part.name, self._device, self._dtype)
        return part_identity(part), part_stamp(part), dtype, FAMILIES[card.family].traits(card, part.name)

    def _component(self, card: Card, part: Part) -> Component:
        """The component of a part, which cards share that differ in nothing that changes it."""
        key = self.key(card, part)
        found = next((one for one in self._policy.components if one.key == key), None)
        if found is None:
            found = Component(part, self._device, part_dtype(part.name, self._device, self._dtype), key)
            with self._lock:
                self._policy.components.append(found)
        return found
