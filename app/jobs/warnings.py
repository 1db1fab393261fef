"""Warnings: what a body asks for without effect, in words for the reply."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from app.cards.card import Card
from app.imaging import Format, left_out
from app.jobs.body import ImageBody
from app.jobs.job import Job
from app.request import Guidance
from app.samplers.table import compile_table

_OPENAI: dict[str, tuple[tuple[Any, ...], str]] = {
    "background": (("auto", "opaque"), "pictures are opaque"),
    "quality": (("auto", "standard"), "num_inference_steps says how much work goes into a picture"),
    "style": ((), "write the style into the prompt"),
    "moderation": (("auto", "low"), "nothing is filtered here"),
    "complexity": (("auto",), "no model here has such a setting"),
}
"""OpenAI's fields that change nothing here: the values that ask for nothing else, and what a person should know."""

_SYNTAX = re.compile(
    r"""
      \( [^()]* (?: : \s*+ -?[0-9]*+\.[0-9]++ | [^()0-9] : \s*+ [0-9]++ ) \s*+ \)  # (word:1.3) as in A1111 and ComfyUI
    | \( [^()]+ \) (?: [0-9]?\.[0-9]+ | \+{1,9} | -{2,9} )                         # (word)1.3 as in InvokeAI and compel
    | \[ [^][:]*+ : (?: [^][:]*+ : )? \s*+ (?: [0-9]*+\. )? [0-9]++ \s*+ \]        # [a:b:0.5]   prompt editing
    | < (?: lora | lyco | hypernet ) : [^<>]* >                                    # <lora:name:0.8>
    | \b embedding : \w+                                                           # embedding:name
    """,
    re.VERBOSE | re.IGNORECASE,
)


def of_body(body: ImageBody, format: Format, raw: bool) -> Iterator[str]:
    """What is without effect whichever model draws. format: of the answer; raw: Accept asks for bytes."""
    if body.output_format not in (None, format):
        yield f"output_format is ignored: Accept asks for image/{format}"
    if body.output_compression is not None and format == "png":
        yield "output_compression is ignored: png is lossless; jpeg and webp have a quality"
    if body.partial_images and not body.stream:
        yield "partial_images is ignored: previews come with stream"
    if body.stream and raw:
        yield f"Accept: image/{format} is not followed: stream answers with events"
    for field, (plain, why) in _OPENAI.items():
        value = getattr(body, field)
        if value is not None and value not in plain:
            yield f"{field} is ignored: {why}"
    for field in ("prompt", "negative_prompt"):
        texts = getattr(body, field) or []
        for found in map(_SYNTAX.search, [texts] if isinstance(texts, str) else texts):
            if found:
                yield f'{field}: "{found[0][:40]}" is read as plain text: a prompt has no weights and no tags here'


def of_model(job: Job) -> Iterator[str]:
    """What is without effect with this model, or for this key."""
    body, card, recipe, delivery = job.body, job.card, job.request.recipe, job.request.delivery
    if card.draws_classes and body.class_label is not None and body.prompt:
        yield f"prompt is ignored: {card.id} draws class_label"
    yield from _of_guidance(body, card, recipe.guidance)
    if delivery.previews >= recipe.steps:  # else a sampler with two lines a step has more than are asked for
        most = compile_table(card.schedule, recipe.sampler, recipe.steps, tokens=1).lines - 1
        if delivery.previews > most:
            yield f"partial_images: at most {most} come before an image of {recipe.steps} steps"
    if body.priority is not None and body.priority > delivery.priority:
        yield f"priority is {delivery.priority}: more is not for this key"


def of_file(format: Format, facts: dict[str, Any]) -> Iterator[str]:
    """What the file of these facts has no room for."""
    if names := left_out(format, facts):
        yield f"the request in the file is without {', '.join(names)}: a jpeg holds 64 kB of it, png and webp hold all"


def _of_guidance(body: ImageBody, card: Card, guidance: Guidance) -> Iterator[str]:
    """Fields of guidance that guide nothing."""
    field = "true_cfg_scale" if card.guidance == "embedded" else "guidance_scale"
    scale = getattr(body, field)
    if scale is not None and 0 < scale < 1:
        yield f"{field} is ignored: 1 or less draws without guidance"
    if body.negative_prompt and not guidance.guided:
        default = "" if scale is not None else f", and {card.id} draws without by default"
        yield f"negative_prompt is ignored: it takes a {field} over 1{default}"
    span = [name for name in ("start", "stop") if getattr(body, f"skip_layer_guidance_{name}") is not None]
    if span and not (guidance.skip and guidance.skip.scale):
        yield f"skip_layer_guidance_{span[0]} is ignored: there is no skip-layer guidance without a scale"
