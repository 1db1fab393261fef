"""Card: the TOML facts of a checkpoint. The one authority on what a model is, wants and allows.

Knows nothing of tensors; reading a card opens no weights. An invalid card is left out and named, with file and field.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from app.cards.aliases import valid_alias, with_aliases
from app.cards.cards import Cards, taken
from app.cards.facts import FACTS, FamilyFacts
from app.cards.files import read_toml
from app.cards.folder import labels_of
from app.errors import CardError
from app.samplers.schedule import Part, Schedule

Size = tuple[int, int]
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")


def parse_size(text: str) -> Size:
    """ "WxH" -> (width, height) in pixels. Raises ValueError."""
    found = _SIZE.fullmatch(text)
    if not found:
        raise ValueError(f'"{text}" is not a size like "512x512"')
    return int(found[1]), int(found[2])


class Source(Part):
    """Where the files are: a folder (relative to the card's own) or a Hub repository at a revision."""

    path: str | None = None
    repo: str | None = None
    revision: str | None = None

    @model_validator(mode="after")
    def _one(self) -> Source:
        if (self.path is None) == (self.repo is None):
            raise ValueError("give either path or repo")
        return self


class Defaults(Part):
    """What a request gets when it does not say."""

    sampler: str
    num_inference_steps: Annotated[int, Field(ge=1)]
    guidance_scale: Annotated[float, Field(ge=0)]
    size: str


class Sizes(Part):
    """Allowed width and height in pixels; min == max means that size only; square means width == height."""

    min: Annotated[int, Field(ge=8)]
    max: Annotated[int, Field(ge=8, le=8192)]
    multiple: Annotated[int, Field(ge=1)] = 16
    square: bool = False


class Limits(Part):
    """The bounds of a request; an error names the field and this range."""

    sizes: Sizes
    num_inference_steps: Annotated[int, Field(ge=1, le=1000)] = 100
    guidance_scale: Annotated[float, Field(gt=0)] = 30.0
    n: Annotated[int, Field(ge=1, le=64)] = 10
    prompt: Annotated[int, Field(ge=1, le=32_000)] = 10_000


class Text(Part):
    """Padded text lengths in tokens, as the upstream pipeline pads: SD3 has 77 CLIP and 256 T5 tokens."""

    clip: Annotated[int, Field(ge=2, le=77)] = 77
    t5: Annotated[int, Field(ge=1, le=512)] = 256


class SkipLayers(Part):
    """Skip-layer guidance: a third pass without these blocks, which guidance moves away from too (SD3.5-medium).

    layers: blocks that the pass leaves out. scale: 0 is off, unless a request says more. It acts on the steps i with
    start * steps < i < stop * steps, counted from 0, as pipeline_stable_diffusion_3.py counts them.
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


class Bucket(Part):
    """The fixed batch sizes of deterministic mode: every forward is padded to these."""

    passes: Annotated[int, Field(ge=8)] = 8
    encode: Annotated[int, Field(ge=1)] = 1
    decode: Annotated[int, Field(ge=1)] = 1


class Card(Part):
    """The facts of one model. `folder` and `labels` are filled in by `read_card`, not by the TOML.

    like: id of the card whose settings `instep models add` took for this one.
    classes: how many a dit has whose model_index.json names none, or is not downloaded yet.
    files: parts whose tensors are in one safetensors file of the authors' own layout, not in the part's folder.
    guidance: "cfg" takes two passes above a scale of 1; "embedded" (FLUX.1-dev) is an input of the network, where 1 is
    a scale like others. parameters: of the denoising network. bytes: of all weights as they are downloaded.
    """

    id: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    family: Literal["dit", "sd3", "flux"]
    like: str = ""
    source: Source
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

    @property
    def file(self) -> Path:
        return self.folder / "card.toml"

    @property
    def default_size(self) -> Size:
        return parse_size(self.defaults.size)

    @property
    def facts(self) -> FamilyFacts:
        """Those of its family."""
        return FACTS[self.family]

    @property
    def draws_classes(self) -> bool:
        """Whether a picture is drawn from a class label; else it is drawn from a prompt."""
        return self.facts.draws == "class"

    @property
    def text_length(self) -> int:
        """Tokens that the longest text encoder is padded to unless the request says otherwise; 0 for classes."""
        return 0 if self.draws_classes else self.text.t5

    @model_validator(mode="after")
    def _agrees(self) -> Card:
        width, height = parse_size(self.defaults.size)
        sizes = self.limits.sizes
        for side in (width, height):
            if not sizes.min <= side <= sizes.max or side % sizes.multiple:
                raise ValueError(f"defaults.size {self.defaults.size} is outside limits.sizes")
        if self.defaults.num_inference_steps > self.limits.num_inference_steps:
            raise ValueError("defaults.num_inference_steps is over limits.num_inference_steps")
        if self.classes is not None and not self.draws_classes:
            raise ValueError(f"classes: {self.family} draws prompts")
        if self.guidance == "embedded" and not self.facts.embedded_guidance:
            raise ValueError(f"guidance: {self.family} has no embedded guidance")
        if self.skip_layer_guidance is not None and not self.facts.skip_layers:
            raise ValueError(f"skip_layer_guidance: {self.family} has none")
        twice = sorted(self.components.keys() & self.files.keys())
        if twice:
            raise ValueError(f"files.{twice[0]}: components names it too")
        return self


def read_card(file: Path) -> Card:
    """Read and validate one card.toml. Raises CardError naming the file and the field."""
    try:
        raw = read_toml(file)
    except (OSError, ValueError, RecursionError) as error:
        raise CardError(f"{file}: {error}") from error
    for filled in ("folder", "labels"):
        if filled in raw:
            raise CardError(f"{file}: {filled}: unknown field")
    try:
        card = Card(**{**raw, "folder": file.parent.resolve()})
    except ValidationError as error:
        first = error.errors()[0]
        field = ".".join(str(part) for part in first["loc"]) or "card"
        raise CardError(f"{file}: {field}: {first['msg']}") from error
    try:
        return card.model_copy(update={"labels": labels_of(card)})
    except (OSError, ValueError) as error:  # a name that no file system takes
        raise CardError(f"{file}: source: {error}") from error


def read_cards(folder: Path, aliases: str = "") -> Cards:
    """Every `<folder>/<id>/card.toml`, by id, with the aliases of the setting ALIAS.

    A card that is invalid, or has a name that one before it has, is among `skipped`. Raises SettingsError: what
    `with_aliases` refuses.
    """
    cards = Cards()
    for file in sorted(folder.glob("*/card.toml")):
        try:
            card = read_card(file)
        except CardError as error:
            cards.skip(file, error)
            continue
        if card.id in cards:
            cards.skip(file, taken(file, card.id, cards[card.id].file), card)
        else:
            cards[card.id] = card
    cards.check_aliases()
    cards.check_components()
    cards.update(with_aliases(cards, aliases))
    return cards
