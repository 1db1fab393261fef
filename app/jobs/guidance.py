"""Guidance: what of a body, and of the card's defaults, guides its rows; and the same told back in the body's words.

Knows nothing of passes or of networks.
"""

from __future__ import annotations

from typing import Any, Protocol

from app.cards.card import Card
from app.errors import InvalidValue
from app.jobs.fields import within
from app.request import Guidance, SkipGuidance


class Asked(Protocol):
    """The fields of a body that guide, as they came: null is not given."""

    guidance_scale: float | None
    true_cfg_scale: float | None
    skip_layer_guidance_scale: float | None
    skip_layer_guidance_start: float | None
    skip_layer_guidance_stop: float | None


def guidance_of(body: Asked, card: Card) -> Guidance:
    """Raises InvalidValue for a scale out of range, or of a kind of guidance that the card does not have."""
    asked = within("guidance_scale", body.guidance_scale, 0, card.limits.guidance_scale)
    scale = float(card.defaults.guidance_scale if asked is None else asked)
    if card.guidance == "embedded":
        # As FluxPipeline: the network is given guidance_scale, and classifier-free guidance has a scale of its own.
        true = within("true_cfg_scale", body.true_cfg_scale, 0, card.limits.guidance_scale)
        scale, embedded = float(true or 1.0), scale
    elif body.true_cfg_scale is not None:
        message = f"true_cfg_scale: {card.id} has no embedded guidance; its guidance_scale is classifier-free guidance"
        raise InvalidValue(message, param="true_cfg_scale")
    else:
        embedded = None
    return Guidance(scale, embedded, _skip_of(body, card, scale > 1))


def guidance_facts(guidance: Guidance) -> dict[str, Any]:
    """The fields of a body that ask for this guidance."""
    told: dict[str, Any] = {"guidance_scale": guidance.scale if guidance.embedded is None else guidance.embedded}
    if guidance.embedded is not None and guidance.guided:
        told["true_cfg_scale"] = guidance.scale
    if guidance.skip is not None:
        told["skip_layer_guidance_scale"] = guidance.skip.scale
        told["skip_layer_guidance_start"] = guidance.skip.start
        told["skip_layer_guidance_stop"] = guidance.skip.stop
    return told


def _skip_of(body: Asked, card: Card, guided: bool) -> SkipGuidance | None:
    """Skip-layer guidance goes beside classifier-free guidance, so an unguided request has none."""
    given = {
        "scale": within("skip_layer_guidance_scale", body.skip_layer_guidance_scale, 0, card.limits.guidance_scale),
        "start": within("skip_layer_guidance_start", body.skip_layer_guidance_start, 0, 1),
        "stop": within("skip_layer_guidance_stop", body.skip_layer_guidance_stop, 0, 1),
    }
    named = {name: float(value) for name, value in given.items() if value is not None}
    facts = card.skip_layer_guidance
    if facts is None:
        if named:
            field = f"skip_layer_guidance_{next(iter(named))}"
            raise InvalidValue(f"{field}: {card.id} has no skip-layer guidance", param=field)
        return None
    if named.get("scale") and not guided:
        field = "skip_layer_guidance_scale"
        raise InvalidValue(f"{field}: needs a guidance_scale over 1 beside it", param=field)
    skip = SkipGuidance(**{"scale": facts.scale, "start": facts.start, "stop": facts.stop, **named})
    if skip.start >= skip.stop:
        field = "skip_layer_guidance_" + ("start" if "start" in named else "stop")
        raise InvalidValue(f"{field}: {skip.start:g} to {skip.stop:g} is no share of the steps", param=field)
    # A scale of 0 is worth telling back only where the card's own is another.
    return skip if guided and (skip.scale or facts.scale) else None
