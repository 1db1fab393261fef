"""Card: the TOML facts of a checkpoint, and the cards of a folder with the reasons why others are skipped.

A card is the one authority on what a model is, wants and allows. Reading one opens no weights.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal

from pydantic import AfterValidator, Field, ValidationError, model_validator

from app.cards.adapters import MOST_LORAS, Adapter, Lora, variant
from app.cards.files import INDEX, cached_index, read_labels, read_toml
from app.errors import CardError, SettingsError, first_problem
from app.request import Recipe
from app.samplers.schedule import Schedule, Section
from app.samplers.table import Table, compile_table, valid_samplers

Size = tuple[int, int]
_SIZE = re.compile(r"([1-9][0-9]{0,4})x([1-9][0-9]{0,4})")
ID = r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}"
_ALIAS = re.compile(r"[^\s/,=][^/,=]*(/[^/,=]+)*")
_ROUTES = ("classes", "load", "unload")
"""Last words of /v1/models/{model}/..., so no name of a model may end in them."""


Trait = Literal["classes", "embedded_guidance", "skip_layers", "torch_files"]
TRAITS: dict[str, set[Trait]] = {
    "dit": {"classes", "torch_files"},
    "sd3": {"skip_layers"},
    "flux": {"embedded_guidance"},
}
"""Facts of a family of networks, for modules that do not import torch.

classes: pictures are drawn from a class label, not a prompt. embedded_guidance: the network may take the guidance scale
as an input. skip_layers: skip-layer guidance is possible. torch_files: the authors publish .pt files, to be converted.
"""


def parse_size(text: str) -> Size:
    """Parse "WxH" to (width, height) in pixels. Raises ValueError."""
    found = _SIZE.fullmatch(text)
    if not found:
        raise ValueError(f'"{text}" is not a size like "512x512"')
    return int(found[1]), int(found[2])


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


class Bucket(Section):
    """The fixed batch sizes of deterministic mode, to which forwards are padded; a VAE needs small ones at 1024 px."""

    passes: Annotated[int, Field(ge=8)] = 8
    encode: Annotated[int, Field(ge=1)] = 1
    decode: Annotated[int, Field(ge=1)] = 1


WORDS = {"aliases", "description", "like", "license", "gated", "parameters", "bytes", "defaults"}
"""Fields of a card that decide what people read and what a request is, and nothing in an engine."""


class Card(Section):
    """The facts of one model. `folder` and `labels` are filled in by `read_card`, `adapters` by `Registry`.

    base: of a variant, the card whose weights it has, with `loras` on top. like: the card that `instep models add`
    copied settings from. classes: their number where model_index.json names none, or is not downloaded yet. components:
    parts that another card shares, as "<card id>/<folder>". files: parts with their tensors in one safetensors file of
    the authors' own layout. guidance: "cfg" takes two passes above a scale of 1; "embedded" (FLUX.1-dev) is an input of
    the network, where 1 is a scale like others. parameters: of the denoising network. bytes: of all weights as
    downloaded. adapters: all LoRAs here by name, also those for other models; they are no part of the card's JSON.
    """

    id: Annotated[str, Field(pattern=f"^{ID}$")]
    base: str = ""
    loras: Annotated[tuple[Lora, ...], Field(max_length=MOST_LORAS)] = ()
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
    def draws_classes(self) -> bool:
        """Whether pictures are drawn from a class label instead of a prompt."""
        return self.has("classes")

    def table(self, recipe: Recipe, tokens: int = 1) -> Table:
        """The table of a recipe. tokens: of the image; they change no number of lines. Raises InvalidValue."""
        return compile_table(self.schedule, recipe.sampler, recipe.steps, tokens=tokens, strength=recipe.strength)

    @property
    def text_length(self) -> int:
        """Default padded length of the longest text encoder in tokens; 0 for a model of classes."""
        return 0 if self.draws_classes else self.text.t5

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


class Cards(dict[str, Card]):
    """Cards by id. skipped: the error of each card.toml that cannot be served, by its file. read: the cards by their
    files, without the aliases of the setting ALIAS."""

    def __init__(self, cards: Mapping[str, Card] | None = None) -> None:
        super().__init__(cards or {})
        self.skipped: dict[Path, CardError] = dict(cards.skipped) if isinstance(cards, Cards) else {}
        self._reasons: dict[str, CardError] = dict(cards._reasons) if isinstance(cards, Cards) else {}
        self.read: dict[Path, Card] = dict(cards.read) if isinstance(cards, Cards) else {}

    @classmethod
    def of(cls, found: Mapping[Path, Card], errors: Mapping[Path, CardError]) -> Cards:
        """These cards by their files, but one with a name that is the id of another, or a name of one before."""
        cards, found = cls(), dict(sorted(found.items(), key=lambda item: item[0]))
        for file, error in errors.items():
            cards.skip(file, error)
        owners = {card.id: file for file, card in reversed(found.items())}
        for file, card in found.items():
            if name := next((name for name in card.names if owners.get(name, file) != file), ""):
                cards.skip(file, CardError(f"{file}: the name {name} is already used by {owners[name]}"), card)
            else:
                cards[card.id] = card
                owners |= dict.fromkeys(card.names, file)
        cards.check_others()
        cards.read = {file: card for file, card in found.items() if cards.get(card.id) is card}
        return cards

    @property
    def owners(self) -> dict[str, Card]:
        """Every card by each of its names."""
        return {name: card for card in self.values() for name in card.names}

    @property
    def models(self) -> dict[str, Card]:
        """Those with weights of their own, which are all that an engine knows."""
        return {name: card for name, card in self.items() if not card.base}

    def skip(self, file: Path, error: CardError, card: Card | None = None) -> None:
        """Leave this file out, and with its card those that take parts of it."""
        self.skipped[file] = error
        self._reasons = {**dict.fromkeys((file.parent.name, *(card.names if card else ())), error), **self._reasons}
        if card and self.get(card.id) is card:
            del self[card.id]
            self.check_others()

    def check_others(self) -> None:
        """Skip every card with a base or `components` that name a card or a folder that does not exist."""
        for card in list(self.values()):
            if card.id in self and card.model not in self:
                self.skip(card.file, CardError(f"{card.file}: base: {card.base} is gone{self.reason(card.base)}"), card)
            for part, target in card.components.items():
                owner, _, rest = target.partition("/")
                if card.id in self and (owner not in self or not rest or ".." in rest.split("/")):
                    message = f'{card.file}: components.{part}: "{target}" is not "<card id>/<folder>"'
                    self.skip(card.file, CardError(f"{message}{self.reason(owner)}"), card)

    def reason(self, name: str) -> str:
        """The end of a message about a name that no card has: why its card was skipped, or nothing."""
        error = None if name in self else self._reasons.get(name)
        return f"; {error.message}" if error else ""

    def add_aliases(self, setting: str) -> None:
        """Add the aliases of the setting ALIAS: `alias=model`, comma separated, where a model is an id or alias.

        Raises SettingsError: no such model, a name that is taken or no alias.
        """
        owners = self.owners
        for entry in filter(None, (part.strip() for part in setting.split(","))):
            alias, equals, target = (part.strip() for part in entry.partition("="))
            try:
                if not (equals and target):
                    raise ValueError(f'"{entry[:128]}" is not alias=model, as in gpt-image-1=emoji-mmdit')
                valid_alias(alias)
                if target not in owners:
                    why = self.reason(target) or f"; there are {', '.join(self)}"
                    raise ValueError(f'no card is named "{target[:128]}"{why}')
                if taken := self.owners.get(alias):
                    raise ValueError(f'"{alias}" is a name of {taken.id} already')
            except ValueError as error:
                raise SettingsError(f"alias: {error}", param="alias") from None
            card = self[owners[target].id]
            self[card.id] = card.model_copy(update={"aliases": (*card.aliases, alias)})


def read_card(file: Path, bases: Mapping[str, Card] | None = None) -> Card:
    """Read and validate one card.toml. bases: by id, for a variant. Raises CardError naming the file and the field."""
    try:
        raw = read_toml(file)
        if filled := raw.keys() & {"folder", "labels", "adapters"}:
            raise ValueError(f"{min(filled)}: unknown field")
        if raw.keys() & {"base", "loras"}:
            if not (base := (bases or {}).get(str(raw.get("base")))):
                raise ValueError(f'base: no card with weights of its own has the id "{raw.get("base", "")}"')
            raw = variant(raw, base.model_dump())
    except (OSError, ValueError, RecursionError) as error:
        raise CardError(f"{file}: {error}") from error
    try:
        card = Card(**{**raw, "folder": file.parent.resolve()})
    except ValidationError as error:
        place, reason = first_problem(error.errors())
        raise CardError(": ".join(filter(None, (str(file), ".".join(place), reason)))) from error
    try:
        return card if card.base else card.model_copy(update={"labels": _labels(card)})
    except (OSError, ValueError) as error:  # a name that no file system takes
        raise CardError(f"{file}: source: {error}") from error


def read_files(folder: Path) -> tuple[dict[Path, Card], dict[Path, CardError]]:
    """Every `<folder>/<id>/card.toml`, read or with its error; one that is a link without a file is an error too."""
    found: dict[Path, Card] = {}
    errors: dict[Path, CardError] = {}
    files = sorted(entry / "card.toml" for entry in folder.glob("*"))
    for file in (*files, *files):  # twice, because a variant may come before its base
        bases = {card.id: card for card in found.values() if not card.base}
        try:
            found[file] = found.get(file) or read_card(file, bases)
            errors.pop(file, None)
        except CardError as error:
            if not isinstance(error.__cause__, FileNotFoundError | NotADirectoryError) or file.is_symlink():
                errors[file] = error
    return found, errors


def read_cards(folder: Path, aliases: str = "") -> Cards:
    """The cards of a folder, with the aliases of the setting ALIAS; one that is invalid is among `skipped`.

    Raises SettingsError as `add_aliases`.
    """
    cards = Cards.of(*read_files(folder))
    cards.add_aliases(aliases)
    return cards


def _labels(card: Card) -> tuple[str, ...]:
    """The class names of its model_index.json, else as many numbered ones as `classes` says; none for prompts.

    Before a repository is downloaded, the index beside the card stands for its own. Raises CardError.
    """
    if not card.draws_classes:
        return ()
    source = card.source
    own = cached_index(source.repo, source.revision) if source.repo else card.folder / str(source.path) / INDEX
    index = own or card.folder / INDEX
    labels = read_labels(index) if index.is_file() else ()
    if labels and card.classes not in (None, len(labels)):
        raise CardError(f"{card.file}: classes: {card.classes}, but {index} names {len(labels)}")
    return labels or tuple(f"class {number}" for number in range(card.classes or 0))
