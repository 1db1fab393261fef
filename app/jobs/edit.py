"""The body of a request that starts from a picture: what it has beside the fields of `ImageBody`, and the size of its
images where it names none."""

from __future__ import annotations

import hashlib
import math
from bisect import bisect_left
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import Field

from app.cards.card import Card, Size
from app.jobs.body import MASK_BLUR, RESIZE, ImageBody, read_as
from app.jobs.fields import Flag, Real, expects, without_effect
from app.request import Recipe, Request, Source
from app.source import PICTURES

Resize = Annotated[Literal["crop", "stretch", "pad"], expects("one of crop, stretch, pad")]


class EditBody(ImageBody):
    """The body of POST /v1/images/edits and /v1/images/variations, without the files."""

    strength: Real | None = Field(
        None, description="How much changes: the share of the steps that run, from the picture with noise on it"
    )
    resize: Resize | None = Field(
        None, description="What fits the picture to the size: crop its edges, stretch it, or pad it"
    )
    mask_blur: Real | None = Field(
        None, description="Width of the mask's soft edge, in pixels of a picture of 512; 0 is a hard edge"
    )
    overlay: Flag | None = Field(None, description="Keep the pixels outside the mask exactly; default true")
    input_fidelity: Any = without_effect("strength says how much changes", "low")

    def sized(self, card: Card, width: int, height: int) -> EditBody:
        """This body with the size of its images: where it names none, the one that suits a picture of this size."""
        if self.size not in (None, "auto"):
            return self
        return self.model_copy(update={"size": "{}x{}".format(*nearest_size(card, width, height))})

    def reading(self, recipe: Recipe) -> tuple[int, int, str, float]:
        """The last arguments of `app.source.read_source`: size, resize, and the mask's soft edge in pixels."""
        blur = MASK_BLUR if self.mask_blur is None else self.mask_blur
        return recipe.width, recipe.height, self.resize or RESIZE, blur * max(recipe.width, recipe.height) / 512


def read_edit(raw: object) -> EditBody:
    """The fields of a body beside its files as an EditBody. Raises as `read_as`."""
    return read_as(EditBody, raw, (*EditBody.model_fields, *PICTURES))


def nearest_size(card: Card, width: int, height: int) -> Size:
    """The allowed size nearest in shape to a picture; among those about as near, in area to the default size."""
    sizes, shape, area = card.limits.sizes, width / height, math.prod(card.default_size)
    sides = [side for side in range(sizes.min, sizes.max + 1) if side % sizes.multiple == 0]

    def distance(size: Size) -> float:
        # NOTE: by shape alone, a picture of 1023 x 1000 may well be drawn on three times the default area.
        return abs(math.log(size[0] / size[1] / shape)) + abs(math.log(math.prod(size) / area)) / 16

    def beside(side: int) -> list[int]:
        place = bisect_left(sides, side / shape)
        return [side] if sizes.square else sides[max(0, place - 1) : place + 1]

    return min(((side, other) for side in reversed(sides) for other in beside(side)), key=distance)


def with_source(request: Request, source: Source) -> Request:
    """The request with its source; the recipe gets the SHA-256 of it. It takes some ms a megapixel."""
    digest = hashlib.sha256(source.pixels)
    digest.update(source.mask or b"")
    recipe = replace(request.recipe, source=digest.hexdigest(), masked=source.mask is not None)
    return replace(request, recipe=recipe, source=source)
