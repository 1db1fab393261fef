"""Facts: the fields of a body that draw the same again, for the reply and for the text of a file."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from app.cards.card import NO_REFINER
from app.imaging import sheet_size
from app.jobs.body import FRAMING, MASK_BLUR, RESIZE, SKIPPING
from app.jobs.job import Job
from app.request import Condition, Prompt, Recipe

_OF_EDITS = {"resize": RESIZE, "mask_blur": MASK_BLUR, "overlay": True}
"""Fields of a body with a picture that decide its pixels beside the recipe, and their defaults."""


def facts(job: Job, indices: Sequence[int]) -> dict[str, Any]:
    """The body that makes these images again, for the text chunk of their file: complete, and valid to POST."""
    specs = [job.request.images[index] for index in indices]
    field, _ = shown(specs[0].condition)
    values = [shown(spec.condition)[1] for spec in specs]
    alike = len(set(values)) == 1
    found: dict[str, Any] = {"model": job.card.id, field: values[0] if alike else values}
    negative = getattr(specs[0].condition, "negative", "")
    cards = [job.card, *([job.refiner] if job.refiner else [])]
    if not job.card.draws_classes and not (negative is None and any(card.force_zeros for card in cards)):
        found["negative_prompt"] = negative or ""
    if len(specs) > 1 and alike:
        found["n"] = len(specs)
    if job.columns:
        found["grid"] = {"columns": job.columns}
    for name, default in _OF_EDITS.items():
        if (value := getattr(job.body, name, None)) not in (None, default):
            found[name] = value
    if job.card.refiner:
        found["refiner"] = {"model": NO_REFINER}
    return found | {"seed": specs[0].seed, **recipe_facts(job.request.recipe)}


def shown(condition: Condition) -> tuple[str, Any]:
    """The field of a body that asks for this condition, and its value."""
    return ("prompt", condition.text) if isinstance(condition, Prompt) else ("class_label", condition.index)


def effective(job: Job, images: int) -> dict[str, Any]:
    """The parameters of a file that shows this many images, those that were absent in the body too."""
    recipe = job.request.recipe
    width, height = sheet_size(images, job.columns or 1, recipe.width, recipe.height)
    file = {"size": f"{width}x{height}", "output_format": job.format, "quality": "auto", "background": "opaque"}
    return recipe_facts(recipe) | file


def recipe_facts(recipe: Recipe) -> dict[str, Any]:
    """The fields of a body that ask for this recipe."""
    guidance = recipe.guidance
    facts = {
        "model": recipe.model,
        "size": f"{recipe.width}x{recipe.height}",
        "sampler": recipe.sampler,
        "num_inference_steps": recipe.steps,
        "guidance_scale": guidance.scale if guidance.embedded is None else guidance.embedded,
    }
    if recipe.strength is not None:
        facts["strength"] = recipe.strength
    if recipe.text_length:
        facts["max_sequence_length"] = recipe.text_length
    if guidance.embedded is not None and guidance.guided:
        facts["true_cfg_scale"] = guidance.scale
    if recipe.adapters:
        facts["loras"] = [{"name": name, "weight": weight} for name, weight in recipe.adapters]
    if recipe.grid:
        facts["schedule"] = recipe.grid
    if recipe.clip_skip:
        facts["clip_skip"] = recipe.clip_skip
    if recipe.refiner:
        facts["refiner"] = recipe.refiner._asdict()
    if recipe.framing:
        original, crop, target = ((across, down) for down, across in recipe.framing)
        facts |= zip(FRAMING, ("{}x{}".format(*original), [*crop], "{}x{}".format(*target)), strict=True)
    if skip := guidance.skip:
        facts |= zip(SKIPPING, (skip.scale, skip.start, skip.stop), strict=True)
    return facts
