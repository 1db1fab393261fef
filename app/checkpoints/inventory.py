"""Inventory: the networks in a user's files, the cards that they fit, and the card that is written for them.

Only headers are read, and each is checked before it is believed.
"""

import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import chain, count
from math import isqrt
from pathlib import Path
from typing import Any

import torch

from app.cards.card import ID, Card
from app.cards.cards import read_card
from app.cards.catalog import SHIPPED
from app.cards.files import INDEX, PICKLES, read_classes, read_json, read_toml, write_json, write_toml
from app.cards.folder import WITHOUT, ModelFolder, Part, changes, schedule_of
from app.checkpoints.parts import prove
from app.checkpoints.tensors import State, read_names, read_outline, read_torch_zip
from app.errors import CheckpointError, LoadError
from app.families import FAMILIES
from app.families.authors import Layout, parts_in
from app.families.components import counts, differences, has_weights, outline_of

BESIDES = {
    "AutoencoderKL": ("scaling_factor", "shift_factor"),
    "DiTTransformer2DModel": ("sample_size",),
    "Transformer2DModel": ("sample_size",),
}
"""Keys of configs that distinguish networks of the same shapes."""

OWN = ("id", "like", "aliases", "source", "variant", "refiner", "components", "files", "bytes", "gated")
"""Fields of a card that are not taken from the one that it is like."""

NETWORKS = {family.required[0] for family in FAMILIES.values()}
"""Names of the parts that denoise."""


@dataclass(frozen=True, slots=True)
class Found:
    """A network or a tokenizer in a user's files. place: its folder, or the file that has it, perhaps beside others.

    state: its tensors on the meta device, by their names there; none for a tokenizer. original: how its authors name
    it; None for diffusers' names.
    """

    place: Path
    state: State = field(default_factory=dict)
    original: Layout | None = None


@dataclass
class Fit:
    """A card that files fit, and the new card that is written for them, with the settings of this one.

    path: the files. cards: all cards by id. configs: the parts of the card, with the folders of the configs that files
    are compared with. parts: of the new card, from files of the user, or as "<id>/<folder>" of another card. odd: parts
    in the files that cannot be used, with the reason.
    """

    card: Card
    path: Path
    cards: Mapping[str, Card]
    configs: Mapping[str, Part]
    parts: dict[str, Found | str] = field(default_factory=dict)
    odd: dict[str, str] = field(default_factory=dict)

    @property
    def whole(self) -> bool:
        """Whether the files are a diffusers folder, and not one part of it or a file."""
        return (self.path / INDEX).is_file()

    @property
    def own(self) -> dict[str, Found]:
        """The parts that come from the user's files."""
        return {part: one for part, one in self.parts.items() if isinstance(one, Found)}

    @property
    def missing(self) -> list[str]:
        """The parts of the card that the new one lacks."""
        return [part for part in self.configs if part not in self.parts]

    @property
    def needed(self) -> list[str]:
        """The parts that the new model cannot do without."""
        without = WITHOUT[self.card.family]
        used = sorted(one for one in self.configs if one[:4] == "text" and (one in self.parts or one not in without))
        return [*FAMILIES[self.card.family].required, *used, *(f"tokenizer{one[12:]}" for one in used)]

    @property
    def schedule(self) -> dict[str, Any]:
        """The new card's `schedule`: that of the card, with the files' own facts. Raises CheckpointError."""
        raw = read_toml(self.card.file)["schedule"]
        return schedule_of(self.path, raw) if self.whole else raw

    def network(self, part: str) -> Part | None:
        """The part if it is a network with a config on this machine."""
        one = self.configs.get(part)
        return one if one and has_weights(one.class_name) and (one.folder / "config.json").is_file() else None

    def counts(self, part: str) -> tuple[int, int]:
        """Parameters of a network, and all numbers that it keeps in memory."""
        return counts(self.configs[part].class_name, self.configs[part].folder)

    def differences(self, part: str, found: Found) -> list[str] | None:
        """How a found part differs from the card's, a line each; None where it is not even of the same kind."""
        own, state = self.network(part), found.state
        if own is None or not state:
            return None
        if found.original is not None:
            if own.class_name not in found.original.classes:
                return None
            try:
                state = found.original.read(own.class_name, state)
            except ValueError as error:
                return [str(error)]
        return differences(own.class_name, own.folder, state) or _besides(own, found)

    def take(self, part: str, place: Path) -> None:
        """Take a part from a place of its own. Raises CheckpointError, LoadError."""
        if part not in self.configs:
            raise LoadError(f"{flag(part)}: {self.card.id} has no such part")
        place = place / part if (place / INDEX).is_file() else place
        fitting = (one for one in take_inventory(place).parts.values() if self.differences(part, one) == [])
        found = next(fitting, None)
        if found is None:
            raise CheckpointError(f"{place}: is not the {part} of {self.card.id}")
        self._add(part, found)

    def take_tokenizers(self, place: Path) -> None:
        """Take the tokenizers that the model uses from a folder. Raises LoadError: there are none."""
        named = [part for part in self.configs if part.startswith("tokenizer") and (place / part).is_dir()]
        if not named:
            raise LoadError(f"{place}: there is no folder tokenizer, tokenizer_2 or tokenizer_3 in it")
        for part in named:
            self._add(part, Found(place / part))

    def _add(self, part: str, found: Found) -> None:
        if self.whole:
            raise LoadError(f"{self.path}: is a whole model; no part of it can come from elsewhere")
        self.parts[part] = found

    def take_rest(self, owner: Card) -> None:
        """Take what is still missing from another card. Raises LoadError: it is of another kind."""
        other = _fit(owner, self.path, self.cards)
        if other is None or owner.family != self.card.family:
            raise LoadError(f"--rest {owner.id}: it is no {self.card.family}, as {self.card.id} is")
        for part in self.missing:
            if part in other.configs and self.configs[part].class_name == other.configs[part].class_name:
                self.parts[part] = owner.components.get(part, f"{owner.id}/{part}")

    def refuse_gaps(self) -> None:
        """Raises LoadError when a part is missing that the model cannot do without, with what to do."""
        if gaps := [part for part in self.needed if part not in self.parts]:
            words = (f"{flag(part)} PATH" if part[:9] != "tokenizer" else "--tokenizers FOLDER" for part in gaps)
            flags = "" if self.whole else f"{' '.join(dict.fromkeys(words))}, or "
            rest = f"--rest {self.card.id} to take what is missing from that card"
            raise LoadError(f"{self.path}: {', '.join(gaps)} missing: give {flags}{rest}")

    def left_out(self) -> list[str]:
        """A line for each encoder that the model will be without, with the reason where the files have one."""
        without = WITHOUT[self.card.family]
        odd = {part: f": {short(reason)}" for part, reason in self.odd.items()}
        absent = [part for part in self.missing if part in without]
        return [f"without {part}{odd.get(part, '')} ({without[part]})" for part in absent]

    def own_schedule(self) -> list[str]:
        """A line where the folder's own scheduler_config.json differs from the card."""
        found = changes(self.card.schedule, self.schedule)
        return [f"the schedule is the folder's own: {', '.join(found)}"] if found else []

    def write(self, folder: Path) -> None:
        """Write the new card's folder, named as its id, or nothing.

        Raises CardError, LoadError: no model can be built of it.
        """
        folder.mkdir()
        file = folder / "card.toml"
        try:
            if not self.whole:
                self._write_layout(folder)
            zeros = read_json(self.path / INDEX).get("force_zeros_for_empty_prompt") if self.whole else None
            card = {
                "id": folder.name,
                "like": self.card.id,
                **{name: value for name, value in read_toml(self.card.file).items() if name not in OWN},
                **({} if zeros is None else {"force_zeros": zeros}),
                "schedule": self.schedule,
                "source": {"path": str(self.path) if self.whole else "."},
            }
            originals = {k: str(one.place) for k, one in self.own.items() if one.original is not None}
            tables = {"components": {k: v for k, v in self.parts.items() if isinstance(v, str)}, "files": originals}
            write_toml(file, card | {name: table for name, table in tables.items() if table})
            prove(read_card(file), self.cards)
        except BaseException as error:
            shutil.rmtree(folder)
            if isinstance(error, LoadError):
                raise type(error)(error.message.replace(str(file), str(self.path))) from error
            raise

    def _write_layout(self, folder: Path) -> None:
        """Write model_index.json, the configs of parts in files, and links to folders and plain files."""
        like, own = ModelFolder(self.card, self.cards).beside(), self.own
        index = {name: value for name, value in like.index().items() if name in own or name not in self.configs}
        write_json(folder / INDEX, index)
        configs = {part: self.configs[part].folder for part, one in own.items() if not one.place.is_dir()}
        for part, place in {**configs, "scheduler": like.path / "scheduler"}.items():
            for file in sorted(place.glob("*config.json")):
                (folder / part).mkdir(exist_ok=True)
                shutil.copyfile(file, folder / part / file.name)
        for part, one in own.items():
            if one.place.is_dir():
                (folder / part).symlink_to(one.place)
            elif one.original is None:
                (folder / part / "model.safetensors").symlink_to(one.place)


@dataclass
class Inventory:
    """The parts of a user's files at `path`, by their names, and the cards that these fit.

    misfits: of the cards that do not fit, the number of differences and words for the first. odd: parts of a file that
    this server cannot read, and why. others: names in a file that no layout has.
    """

    path: Path
    parts: dict[str, Found] = field(default_factory=dict)
    fits: list[Fit] = field(default_factory=list)
    misfits: list[tuple[int, str]] = field(default_factory=list)
    odd: dict[str, str] = field(default_factory=dict)
    others: list[str] = field(default_factory=list)

    @property
    def pickled(self) -> bool:
        """Whether it is a torch file."""
        return self.path.is_file() and self.path.suffix in PICKLES

    @property
    def bases(self) -> list[Fit]:
        """The fits without cards that were made of another of them; the shipped ones, where there are some."""
        known = {fit.card.id for fit in self.fits}
        own = [fit for fit in self.fits if fit.card.like not in known - {fit.card.id}]
        return [fit for fit in own if fit.card.id in SHIPPED] or own

    def check(self) -> None:
        """Raises CheckpointError: the network is in a form that this server does not read, or no card fits."""
        if networks := NETWORKS & self.odd.keys():
            raise CheckpointError(f"{self.path}: {self.odd[min(networks)]}")
        if self.fits:
            return
        if self.misfits:
            _, nearest = min(self.misfits, key=lambda misfit: misfit[0])
            raise CheckpointError(f"{self.path}: fits no card; the nearest is {nearest}")
        names = next((list(part.state) for part in self.parts.values() if part.state), ["none"])
        first = ", ".join(map(short, names[:3]))
        raise CheckpointError(f"{self.path}: in no layout that is known here; its tensors: {first} ...")

    def choose(self, like: Card | None) -> Fit:
        """The fit of this card, or else the only one, to be written. Raises CheckpointError, LoadError."""
        if self.pickled:
            raise LoadError(f"{self.path}: a server does not load torch files; first: instep models convert")
        self.check()
        fits = {fit.card.id: fit for fit in (self.fits if like else self.bases)}
        if like and like.id not in fits:
            raise CheckpointError(f"{self.path}: is not like {like.id}; it fits {', '.join(fits)}")
        if not all(fit.card.network in fit.parts for fit in fits.values()):
            raise LoadError(f"{self.path}: the network is not in it; this goes beside one (--vae, --text-encoder ...)")
        if like is None and len(fits) > 1:
            raise LoadError(f"{self.path}: fits {', '.join(fits)}, and the files cannot tell which: say it with --like")
        return fits[like.id if like else next(iter(fits))]

    def _match(self, fit: Fit) -> bool:
        """Give the fit the parts by its names. False: the network is another, or any part where there is no network."""
        if name := next(iter(NETWORKS & self.parts.keys()), ""):
            if name != fit.card.network or self._compare(fit, name, self.parts[name]) != []:
                return False
            fit.parts |= self.parts
            if self.path.is_file():  # a folder's parts have configs of their own
                fit.odd |= self.odd
                for name, part in self.parts.items():
                    lines = fit.differences(name, part)
                    if lines != []:
                        fit.odd[name] = lines[0] if lines else f"{fit.card.id} has no such part"
                        del fit.parts[name]
            return True
        for own, part in self.parts.items():
            if not part.state:
                continue
            names = [name for name in sorted(fit.configs, key=lambda name: name != own) if name not in fit.parts]
            fitting = next((name for name in names if self._compare(fit, name, part) == []), None)
            if fitting is None:
                return False
            fit.parts[fitting] = part
        return bool(fit.parts)

    def _compare(self, fit: Fit, name: str, part: Found) -> list[str] | None:
        """The differences, noted where the card has names of tensors in common with the part."""
        if lines := fit.differences(name, part):
            own = outline_of(fit.configs[name].class_name, fit.configs[name].folder)
            if part.original is not None or own.keys() & part.state.keys():
                more = f", and {len(lines) - 1} more differences" if len(lines) > 1 else ""
                words = f"{fit.card.id}, but its {name} is another: {short(lines[0])}{more}"
                self.misfits.append((len(lines), words))
        return lines


def identify(path: Path, cards: Mapping[str, Card]) -> Inventory:
    """Compare a diffusers folder, or one file, with every card that has configs. Raises CheckpointError."""
    found = take_inventory(path)
    fits = (_fit(card, path, cards) for card in cards.values())
    found.fits = [fit for fit in fits if fit and found._match(fit)]
    return found


def take_inventory(path: Path) -> Inventory:
    """The networks of a diffusers folder, a part's folder, a safetensors or a torch file. Raises CheckpointError."""
    found = Inventory(path)
    if path.is_file():
        _read_file(found)
    elif (path / INDEX).is_file():
        for name, class_name in read_classes(path / INDEX).items():
            if (path / name).is_dir():
                found.parts[name] = Found(path / name, read_outline(path / name) if has_weights(class_name) else {})
    elif (path / "config.json").is_file():
        found.parts[""] = Found(path, read_outline(path))
    else:
        raise CheckpointError(f"{path}: neither a safetensors file nor a folder with {INDEX}")
    return found


def _read_file(found: Inventory) -> None:
    """The parts of one file; one by diffusers' or transformers' names has no name yet."""
    file, state, trouble = found.path, State(), None
    if found.pickled:
        state = {key: torch.empty_like(value, device="meta") for key, value in read_torch_zip(file).items()}
    names = state.keys() or read_names(file)
    originals = parts_in(names)
    prefixes = tuple(one.prefix for one in originals.values())
    found.others = sorted(name for name in names if originals and not name.startswith(prefixes))
    for part, one in originals.items():
        try:
            found.parts[part] = Found(file, state or read_outline(file, one.prefix), one)
        except CheckpointError as error:  # a number format, of which other parts know nothing
            found.odd[part], trouble = error.message.removeprefix(f"{file}: "), error
    if trouble and not found.parts:
        raise trouble
    if not originals:
        found.parts[""] = Found(file, state or read_outline(file))


def _fit(card: Card, path: Path, cards: Mapping[str, Card]) -> Fit | None:
    """The card with the configs of its parts; None where its network's is not here, or is another card's."""
    with suppress(CheckpointError):
        fit = Fit(card, path, cards, {part.name: part for part in ModelFolder(card, cards).beside().parts()})
        return fit if card.network not in card.components and fit.network(card.network) else None
    return None


def _besides(part: Part, found: Found) -> list[str]:
    """Differences that no shape shows: of the configs, or of the positions in a DiT's file."""
    own = read_json(part.folder / "config.json")
    theirs: Mapping[str, Any] = {}
    if found.place.is_dir() and (found.place / "config.json").is_file():
        theirs = read_json(found.place / "config.json")
    elif found.original and "pos_embed" in found.state:
        theirs = {"sample_size": isqrt(found.state["pos_embed"].shape[1]) * int(own.get("patch_size", 2))}
    both = [name for name in BESIDES.get(part.class_name, ()) if name in own and name in theirs]
    return [f"its {name} is {theirs[name]}, not {own[name]}" for name in both if theirs[name] != own[name]]


def short(text: str) -> str:
    """Text from a file, cut to fit a line."""
    return text if len(text) <= 200 else f"{text[:200]}..."


def flag(part: str) -> str:
    """The option of `instep models add` for a part."""
    return f"--{part.replace('_', '-')}"


def new_folder(path: Path, models: Path, cards: Mapping[str, Card], name: str | None) -> Path:
    """The folder of a new model: of this name, or else named after the files, with a number where that is taken.

    Raises LoadError: the name is none, or is taken.
    """
    taken = {known for card in cards.values() for known in card.names}
    if name is None:
        named = re.sub(r"[^a-z0-9._]+", "-", (path.name if path.is_dir() else path.stem).lower()).strip("-._")[:58]
        ids = (f"{named or 'model'}{number}" for number in chain(("",), (f"-{number}" for number in count(2))))
        return next(models / one for one in ids if one not in taken and not (models / one).exists())
    if not re.fullmatch(ID, name):
        raise LoadError(f'"{name}" cannot be the id of a model: letters, digits, ".", "_", "-"')
    if name in taken or (models / name).exists():
        raise LoadError(f"{models / name}: there is a model of this name already; give another with --id")
    return models / name
