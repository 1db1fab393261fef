"""`instep models add`: a card for files that a user has, where they are: no weights are copied.

Knows nothing of how files are compared (app/pool/identify.py), nor of how the card is written (makings.py).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from app.api.classes import draws_classes
from app.api.downloads import downloaded
from app.api.registry import Registry
from app.card import INDEX, Card, read_cards
from app.cli.bodies import open_registry
from app.cli.check import no_card
from app.cli.makings import Makings, write
from app.cli.serve import Folder, read_settings
from app.errors import CheckpointError, LoadError

if TYPE_CHECKING:
    from app.pool.identify import Report

Given = Annotated[
    Path | None, typer.Option(show_default=False, help="Where this part is: its folder, or a safetensors")
]


def add(
    path: Annotated[Path, typer.Argument(help="A diffusers folder, or a safetensors file in its authors' layout")],
    like: Annotated[str | None, typer.Option(help="The card whose settings it takes; none: the one that fits")] = None,
    name: Annotated[str | None, typer.Option("--id", help="Its id; none: made of the file's name")] = None,
    vae: Given = None,
    text_encoder: Given = None,
    text_encoder_2: Given = None,
    text_encoder_3: Given = None,
    tokenizers: Annotated[Path | None, typer.Option(help="Folder with tokenizer, tokenizer_2 ... in it")] = None,
    rest: Annotated[str | None, typer.Option(help="The card that gives the parts that are still missing")] = None,
    models: Folder = None,
) -> None:
    """Make a card for files of yours, where they are; `instep models check PATH` tells what they are and lack."""
    from app.pool.identify import identify

    settings = read_settings(models=models)
    registry = open_registry(settings)
    path = path.absolute()
    makings = start(identify(path, registry.cards), registry, like)
    given = {
        "vae": vae,
        "text_encoder": text_encoder,
        "text_encoder_2": text_encoder_2,
        "text_encoder_3": text_encoder_3,
    }
    for part, place in given.items():
        if place is not None:
            take(makings, part, place.absolute())
    if tokenizers is not None:
        take_tokenizers(makings, tokenizers.absolute())
    if rest is not None:
        take_rest(makings, registry.find(rest).id, registry)
    refuse_gaps(makings, path)
    model = name or re.sub(r"[^a-z0-9._]+", "-", path.stem.lower()).strip("-.")[:64] or "model"
    folder = free(model, registry, settings.models)
    write(folder, model, makings)
    typer.echo(f"{model}: {folder / 'card.toml'}, like {makings.like.card.id}; the weights stay where they are")
    typer.echo(f"next: {_next(model, read_cards(settings.models))}")


def free(model: str, registry: Registry, models: Path) -> Path:
    """The folder of a new model. Raises LoadError: its name is none, or is taken."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", model):
        raise LoadError(f'"{model}" cannot be the id of a model: letters, digits, ".", "_", "-"')
    folder = models / model
    if folder.exists() or any(model in registry.names(card) for card in registry.cards.values()):
        raise LoadError(f"{folder}: there is a model of this name already; give another with --id")
    return folder


def start(report: Report, registry: Registry, like: str | None) -> Makings:
    """The card that these files are like, and what of it they are. Raises CheckpointError, LoadError."""
    if report.pickled:
        raise LoadError(f"{report.path}: a server does not load torch files; first: instep models convert")
    fits = {one.card.id: (one, pieces) for one, pieces in report.fits}
    wanted = registry.find(like).id if like else None
    if not fits:
        raise CheckpointError(no_card(report))
    if wanted and wanted not in fits:
        raise CheckpointError(f"{report.path}: is not like {wanted}; it fits {', '.join(fits)}")
    if not all("transformer" in pieces for _, pieces in fits.values()):
        raise LoadError(f"{report.path}: the network is not in it; this goes beside one (--vae, --text-encoder ...)")
    if wanted is None and len(fits) > 1:
        raise LoadError(f"{report.path}: fits {', '.join(fits)}, and the files cannot tell which: say it with --like")
    one, pieces = fits[wanted or next(iter(fits))]
    makings = Makings(one)
    good = {part: piece for part, piece in pieces.items() if part not in report.odd}
    if report.path.is_dir():
        makings.source, makings.inside = report.path, {*good, *report.tokenizers}
        return makings
    for part, piece in good.items():
        (makings.files if piece.held else makings.plain)[part] = report.path
    return makings


def take(makings: Makings, part: str, place: Path) -> None:
    """A part from a place of its own, instead of the one that is there. Raises CheckpointError."""
    from app.pool.identify import look

    if part not in makings.like.classes:
        raise LoadError(f"--{part.replace('_', '-')}: {makings.like.card.id} has no such part")
    place = place / part if (place / INDEX).is_file() else place
    for piece in look(place).pieces.values():
        if makings.like.differences(part, piece) == []:
            break
    else:
        raise CheckpointError(f"{place}: is not the {part} of {makings.like.card.id}")
    _forget(makings, part)
    (makings.links if place.is_dir() else makings.files if piece.held else makings.plain)[part] = place


def take_tokenizers(makings: Makings, place: Path) -> None:
    """Those of the folder that the model has a use for. Raises LoadError: there are none."""
    named = [part for part in makings.like.classes if part.startswith("tokenizer") and (place / part).is_dir()]
    if not named:
        raise LoadError(f"{place}: there is no folder tokenizer, tokenizer_2 or tokenizer_3 in it")
    for part in named:
        _forget(makings, part)
        makings.links[part] = place / part


def take_rest(makings: Makings, owner: str, registry: Registry) -> None:
    """What is still missing, from another card. Raises LoadError: it is of another kind."""
    from app.pool.identify import shipped_of

    other = shipped_of(registry.cards[owner])
    if other is None or other.card.family != makings.like.card.family:
        raise LoadError(f"--rest {owner}: it is no {makings.like.card.family}, as {makings.like.card.id} is")
    for part in makings.like.missing(makings.parts):
        if makings.like.classes[part] == other.classes.get(part):
            makings.rest[part] = other.card.components.get(part, f"{owner}/{part}")


def refuse_gaps(makings: Makings, path: Path) -> None:
    """Raises LoadError when a part is missing that the model cannot do without, with what to do."""
    from app.families import FAMILIES

    def flag(part: str) -> str:
        return "--tokenizers FOLDER" if part.startswith("tokenizer") else f"--{part.replace('_', '-')} PATH"

    encoders = [part for part in makings.parts if part.startswith("text_encoder")]
    needed = [*FAMILIES[makings.like.card.family].required, *(f"tokenizer{one[12:]}" for one in sorted(encoders))]
    lacking = [part for part in needed if part not in makings.parts]
    if lacking:
        flags = " ".join(dict.fromkeys(map(flag, lacking)))
        raise LoadError(
            f"{path}: {', '.join(lacking)} missing: give {flags}, or --rest {makings.like.card.id} "
            "to take what is missing from that card"
        )


def _next(model: str, cards: dict[str, Card]) -> str:
    """The command that comes after `add`."""
    if not downloaded(cards[model], cards):
        return f"instep models pull {model}"
    return "instep serve" if draws_classes(cards[model]) else f'instep generate "a red apple" --model {model}'


def _forget(makings: Makings, part: str) -> None:
    if makings.source is not None:
        raise LoadError(f"{makings.source}: is a whole model; parts of it cannot be given beside it")
    for places in (makings.files, makings.plain, makings.links):
        places.pop(part, None)
