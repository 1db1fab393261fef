"""Card: the TOML facts of a checkpoint, and the cards of a folder with the reasons why others are skipped.

A card is the one authority on what a model is, wants and allows. Reading one opens no weights.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, BeforeValidator, Field, Strict, model_validator

from app.cards.adapters import MOST_LORAS, Adapter, Lora
from app.cards.files import Variant
from app.request import Recipe
from app.samplers.schedule import Schedule, Section
from app.samplers.table import Table, compile_legs, valid_samplers

Size = tuple[int, int]
SIDES = "^[1-9][0-9]{0,4}x[1-9][0-9]{0,4}$"
"""A regular expression for what `parse_size` takes."""

ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_ALIAS = re.compile(r"[^\s/,=][^/,=]*(/[^/,=]+)*")
_ROUTES = ("classes", "load", "unload")
"""Last words of /v1/models/{model}/..., so no name of a model may end in them."""

NO_REFINER = "none"
"""The model that a body names as its refiner to draw without the card's own."""


Trait = Literal["classes", "clip_skip", "embedded_guidance", "skip_layers", "t5", "torch_files", "unet"]
TRAITS: dict[str, set[Trait]] = {
    "dit": {"classes", "torch_files"},
    "sd3": {"skip_layers", "t5"},
    "flux": {"embedded_guidance", "t5"},
    "unet": {"clip_skip", "unet"},
}
"""Facts of a family of networks, for modules that do not import torch.

classes: pictures are drawn from a class label, not a prompt. clip_skip: a request may leave out CLIP's last layers.
embedded_guidance: the network may take the guidance scale as an input. skip_layers: skip-layer guidance is possible.
t5: its longest text encoder is a T5, whose length a request chooses. torch_files: the authors publish .pt files, to be
converted. unet: a U-Net denoises, not a transformer.
"""


def parse_size(text: str) -> Size:
    """Parse "WxH" to (width, height) in pixels. Raises ValueError."""
    if not re.fullmatch(SIDES, text):
        raise ValueError(f'"{text}" is not a size like "512x512"')
    width, height = map(int, text.split("x"))
    return width, height


def valid_alias(text: str) -> str:
    """Return the alias if settings and URLs can hold it; slashes are allowed, as in Hub names. Raises ValueError."""
    parts = text.split("/")
    fits = _ALIAS.fullmatch(text) and len(text) <= 128 and text.isprintable() and text == text.strip()
    if not fits or {".", ".."} & set(parts) or parts[-1] in _ROUTES:
        raise ValueError(
            f'"{text[:128]}" is no alias: 1 to 128 printable characters without "," and "=", with something on both '
            f"sides of a slash, and not ending in /{', /'.join(_ROUTES)}"
        )
    return text


class Source(Section):
    """Where the files are: a folder (relative to the card's own) or a Hub repository at a revision."""

    path: str | None = None
    repo: str | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Source:
        if (self.path is None) == (self.repo is None):
            raise ValueError("give either path or repo")
        return self


class Defaults(Section):
    """What a request gets for a field that it leaves out."""

    sampler: str
    num_inference_steps: Annotated[int, Field(ge=1)]
    guidance_scale: Annotated[float, Field(ge=0)]
    size: str
    strength: Annotated[float, Field(gt=0, le=1)] = 0.6


class Sizes(Section):
    """Allowed width and height in pixels; min == max means that size only; square means width == height."""

    min: Annotated[int, Field(ge=8)]
    max: Annotated[int, Field(ge=8, le=8192)]
    multiple: Annotated[int, Field(ge=1)] = 16
    square: bool = False

    @property
    def pattern(self) -> str:
        """A regular expression for the names of these sizes."""
        sides = [str(side) for side in range(self.min, self.max + 1) if side % self.multiple == 0]
        names = [f"{side}x{side}" for side in sides] if self.square else [f"({'|'.join(sides)})x({'|'.join(sides)})"]
        return f"^({'|'.join(names)})$"

    def __str__(self) -> str:
        """The range in words, for a message."""
        if self.min == self.max:
            return f'"{self.min}x{self.min}"'
        shape = "WxW" if self.square else "WxH"
        return f'"{shape}" with sides of {self.min} to {self.max} pixels, multiples of {self.multiple}'


class Limits(Section):
    """The bounds of a request; an error names the field and this range."""

    sizes: Sizes
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 100
    guidance_scale: Annotated[float, Field(gt=0)] = 30.0
    n: Annotated[int, Field(ge=1, le=64)] = 10
    prompt: Annotated[int, Field(ge=1, le=32_000)] = 10_000


class Text(Section):
    """Padded text lengths in tokens, as the upstream pipeline pads: SD3 has 77 CLIP and 256 T5 tokens."""

    clip: Annotated[int, Field(ge=2, le=77)] = 77
    t5: Annotated[int, Field(ge=1, le=512)] = 256


class SkipLayers(Section):
    """Skip-layer guidance: a third pass without these blocks, which guidance moves away from too (SD3.5-medium).

    scale: 0 is off unless a request sets one. It acts on the steps i (from 0) with start * steps < i < stop * steps, as
    in pipeline_stable_diffusion_3.py.
    """

    layers: Annotated[tuple[Annotated[int, Field(ge=0)], ...], Field(min_length=1)]
    scale: Annotated[float, Field(ge=0)] = 0.0
    start: Annotated[float, Field(ge=0, le=1)] = 0.01
    stop: Annotated[float, Field(ge=0, le=1)] = 0.2

    @model_validator(mode="after")
    def _is_a_share(self) -> SkipLayers:
        if self.start >= self.stop:
            raise ValueError("start must be under stop")
        return self


def _share(value: object) -> object:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < 1:
        raise ValueError("expects a number over 0 and under 1")
    return value


class Refining(Section):
    """A second model that draws the last part of a picture, as SDXL's refiner does.

    model: its id or alias, or "none". switch_at: the share of the noise process that the first model draws.
    """

    model: Annotated[str, Strict(), Field(min_length=1, max_length=128)]
    switch_at: Annotated[float, BeforeValidator(_share)] = 0.8


class Bucket(Section):
    """The fixed batch sizes of deterministic mode, to which forwards are padded; a VAE needs small ones at 1024 px."""

    passes: Annotated[int, Field(ge=8)] = 8
    encode: Annotated[int, Field(ge=1)] = 1
    decode: Annotated[int, Field(ge=1)] = 1


WORDS = {"aliases", "description", "like", "license", "gated", "parameters", "bytes", "variant", "defaults", "refiner"}
"""Fields of a card that decide what people read and what a request is, and nothing in an engine."""


class Card(Section):
    """The facts of one model. `folder` and `labels` are filled in by `read_card`, `adapters` by `Registry`.

    base: of a variant, the card whose weights it has, with `loras` on top. like: the card that `instep models add`
    copied settings from. classes: their number where model_index.json names none, or is not downloaded yet. components:
    parts that another card shares, as "<card id>/<folder>". files: parts with their tensors in one safetensors file of
    the authors' own layout. guidance: "cfg" takes two passes above a scale of 1; "embedded" (FLUX.1-dev) is an input of
    the network, where 1 is a scale like others. force_zeros: an absent negative prompt is encoded as zeros (SDXL), else
    as the text "". framing: the network takes sizes beside its text (SDXL). refiner: the one of a request that names
    none. parameters: of the denoising network. bytes: of all weights as downloaded. variant: which files of weights are
    downloaded, if the repository has them. adapters: all LoRAs here by name, also those for other models; they are no
    part of the card's JSON.
    """

    id: Annotated[str, Field(pattern=f"^{ID}$")]
    base: str = ""
    loras: Annotated[tuple[Lora, ...], Field(max_length=MOST_LORAS)] = ()
    family: Literal["dit", "sd3", "flux", "unet"]
    like: str = ""
    source: Source
    variant: Variant = ""
    components: dict[str, str] = Field(default_factory=dict)
    files: dict[str, str] = Field(default_factory=dict)
    aliases: tuple[Annotated[str, AfterValidator(valid_alias)], ...] = ()
    description: str = ""
    schedule: Schedule
    defaults: Defaults
    limits: Limits
    text: Text = Text()
    bucket: Bucket = Bucket()
    guidance: Literal["cfg", "embedded"] = "cfg"
    skip_layer_guidance: SkipLayers | None = None
    force_zeros: bool = False
    framing: bool = False
    refiner: Refining | None = None
    guided_channels: Annotated[int, Field(ge=1)] | None = None
    time_freq_shift: Annotated[float, Field(ge=0)] | None = None
    norm_eps: Annotated[float, Field(gt=0)] | None = None
    classes: Annotated[int, Field(ge=1, le=100_000)] | None = None
    parameters: Annotated[int, Field(ge=1)] | None = None
    bytes: Annotated[int, Field(ge=1)] | None = None
    license: str = ""
    gated: bool = False
    folder: Path = Path()
    labels: tuple[str, ...] = ()
    adapters: dict[str, Adapter] = Field(default_factory=dict, exclude=True, repr=False)

    @property
    def file(self) -> Path:
        return self.folder / "card.toml"

    @property
    def names(self) -> tuple[str, ...]:
        """Every name that a request may use, the id first."""
        return (self.id, *self.aliases)

    @property
    def model(self) -> str:
        """The id of the model that engines know it by: a variant is its base there."""
        return self.base or self.id

    @property
    def default_size(self) -> Size:
        return parse_size(self.defaults.size)

    def has(self, trait: Trait) -> bool:
        """Whether its family has this trait."""
        return trait in TRAITS[self.family]

    @property
    def network(self) -> str:
        """The name of the part that denoises, as in model_index.json."""
        return "unet" if self.has("unet") else "transformer"

    @property
    def draws_classes(self) -> bool:
        """Whether pictures are drawn from a class label instead of a prompt."""
        return self.has("classes")

    def legs(self, recipe: Recipe, tokens: int = 1) -> dict[str, Table]:
        """The table that each model of a recipe computes, by the model's id, in order; a model without a line has none.

        tokens: of the image; the number of lines does not depend on them. Raises InvalidValue as `compile_legs`.
        """
        refiner = recipe.refiner
        tables = compile_legs(
            self.schedule,
            recipe.sampler,
            recipe.steps,
            tokens=tokens,
            strength=recipe.strength,
            switch_at=refiner.switch_at if refiner else None,
            grid=recipe.grid,
        )
        models = [recipe.model, refiner.model] if refiner else [recipe.model]
        return {model: table for model, table in zip(models, tables, strict=True) if table}

    @property
    def text_length(self) -> int:
        """Default padded length of the longest text encoder in tokens; 0 for a model of classes."""
        return self.text.t5 if self.has("t5") else 0 if self.draws_classes else self.text.clip

    @model_validator(mode="after")
    def _agrees(self) -> Card:
        if not re.fullmatch(self.limits.sizes.pattern, self.defaults.size):
            raise ValueError(f"defaults.size {self.defaults.size} is outside limits.sizes")
        samplers = valid_samplers(self.schedule)
        if self.defaults.sampler not in samplers:
            raise ValueError(f'defaults.sampler: "{self.defaults.sampler}" is not one of {", ".join(samplers)}')
        if self.defaults.num_inference_steps > self.limits.num_inference_steps:
            raise ValueError("defaults.num_inference_steps is over limits.num_inference_steps")
        if self.classes is not None and not self.draws_classes:
            raise ValueError(f"classes: {self.family} draws prompts")
        if self.guidance == "embedded" and not self.has("embedded_guidance"):
            raise ValueError(f"guidance: {self.family} has no embedded guidance")
        if self.skip_layer_guidance is not None and not self.has("skip_layers"):
            raise ValueError(f"skip_layer_guidance: {self.family} has none")
        if twice := self.components.keys() & self.files.keys():
            raise ValueError(f"files.{min(twice)}: components names it too")
        return self
