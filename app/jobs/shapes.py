"""Shapes: the JSON that the image routes answer with, as pydantic models; the OpenAPI document is made from them.

Knows nothing of how they are filled (`app/jobs/replies.py`).
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field


class Item(BaseModel):
    """One image. `seed` and the effective parameters of the reply make the same image again."""

    b64_json: str
    seed: int
    class_label: int | None = None
    revised_prompt: str | None = Field(None, description="The name of the class that was drawn")


class TokenDetails(BaseModel):
    """What the input tokens were."""

    text_tokens: int
    image_tokens: int = 0


class Usage(BaseModel):
    """Tokens as the network saw them: text padded to its length, 16 x 16 pixels for one image token."""

    input_tokens: int
    output_tokens: int
    total_tokens: int
    input_tokens_details: TokenDetails


class Stages(BaseModel):
    """Seconds by stage, each of the image that needed longest; `steps` and `shared` (images a forward) as run."""

    queue: float
    encode: float
    denoise: float
    decode: float
    image_encode: float
    steps: int
    shared: float
    cost: float | None = Field(None, description="Device seconds of the whole request, as estimated when accepted")
    estimated_wait: float | None = Field(None, description="Seconds until its turn, as estimated when accepted")
    queue_position: int | None = Field(None, description="Requests on its device not yet answered when it was accepted")


class Effective(BaseModel):
    """What the server made of the request: fields that were absent are told here."""

    model: str
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    size: str = Field(description="Of the file: of the whole sheet when a grid was asked for")
    output_format: str
    quality: str = "auto"
    background: str = "opaque"


class ImagesReply(Effective):
    """OpenAI's images reply with the effective parameters, timings and warnings beside it."""

    created: int
    data: list[Item]
    usage: Usage
    timings: Stages
    warnings: list[str] | None = None


class PartialEvent(Effective):
    """What an image looks like so far."""

    type: Literal["image_generation.partial_image"] = "image_generation.partial_image"
    b64_json: str
    created_at: int
    partial_image_index: int
    image_index: int | None = None


class CompletedEvent(Effective, Item):
    """One finished image of a stream."""

    type: Literal["image_generation.completed"] = "image_generation.completed"
    created_at: int
    usage: Usage
    timings: Stages
    image_index: int | None = None
    warnings: list[str] | None = None


class Panel(BaseModel):
    """The one picture of a comparison."""

    b64_json: str


class Cell(BaseModel):
    """One picture of a comparison, and the request that made it."""

    row: int
    column: int
    model: str
    parameters: int | None = Field(None, description="Of the model's denoising network, where its card says")
    prompt: str | None = None
    class_label: int | None = None
    seed: int
    size: str
    sampler: str
    num_inference_steps: int
    guidance_scale: float
    timings: Stages


class CompareReply(BaseModel):
    """One labelled panel, and what is in each cell of it, row by row."""

    created: int
    data: list[Panel]
    models: list[str] = Field(description="Of the columns, by the number of their parameters")
    cells: list[Cell]
    size: str = Field(description="Of the whole panel")
    output_format: str
    usage: Usage
    timings: Stages
    warnings: list[str] | None = None
