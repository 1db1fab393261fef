"""`instep models add`: a card for files that a user has, where they are: no weights are copied.

Knows nothing of how files are compared (app/checkpoints/identify.py), nor of how the card is written (makings.py).
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

import typer

from app.cards.card import Card, read_cards
from app.cards.catalog import Registry
from app.cards.folder import ModelFolder
from app.cli.bodies import open_registry
from app.cli.compose import left_out, own_schedule, refuse_gaps, start, take, take_rest, take_tokenizers
from app.cli.makings import write
from app.cli.serve import Folder, read_settings
from app.errors import LoadError

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
    from app.checkpoints.identify import identify

    settings = read_settings(models=models)
    registry = open_registry(settings)
    path = path.absolute()
    report = identify(path, registry.cards)
    makings = start(report, registry, like)
    encoders = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2, "text_encoder_3": text_encoder_3}
    for part, place in {"vae": vae, **encoders}.items():
        if place is not None:
            take(makings, part, place.absolute())
    if tokenizers is not None:
        take_tokenizers(makings, tokenizers.absolute())
    if rest is not None:
        take_rest(makings, registry.find(rest).id, registry)
    refuse_gaps(makings, path)
    model = name or free_id(path, registry, settings.models)
    write(free(model, registry, settings.models), makings, registry.cards)
    card = settings.models / model / "card.toml"
    typer.echo(f"{model}: {card}, like {makings.like.card.id}; the weights stay where they are")
    for line in (*left_out(report, makings), *own_schedule(makings)):
        typer.echo(line)
    typer.echo(f"next: {_next(model, read_cards(settings.models))}")


def free(model: str, registry: Registry, models: Path) -> Path:
    """The folder of a new model. Raises LoadError: its name is none, or is taken."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", model):
        raise LoadError(f'"{model}" cannot be the id of a model: letters, digits, ".", "_", "-"')
    if _taken(model, registry, models):
        raise LoadError(f"{models / model}: there is a model of this name already; give another with --id")
    return models / model


def free_id(path: Path, registry: Registry, models: Path) -> str:
    """An id made of the name of the files, with a number behind it where that one is taken."""
    named = re.sub(r"[^a-z0-9._]+", "-", (path.name if path.is_dir() else path.stem).lower()).strip("-._")[:58]
    ids = (f"{named or 'model'}{number}" for number in ("", *(f"-{count}" for count in range(2, 10_000))))
    return next(model for model in ids if not _taken(model, registry, models))


def _taken(model: str, registry: Registry, models: Path) -> bool:
    return (models / model).exists() or any(model in card.names for card in registry.cards.values())


def _next(model: str, cards: dict[str, Card]) -> str:
    """The command that comes after `add`."""
    if not ModelFolder(cards[model], cards).here():
        return f"instep models pull {model}"
    return "instep serve" if cards[model].draws_classes else f'instep generate "a red apple" --model {model}'
