"""`instep models list | show`: the cards as tables."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Literal

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from app.cards.card import Card
from app.cards.folder import ModelFolder
from app.cli.bodies import find, open_registry
from app.cli.serve import Folder, read_settings
from app.jobs.body import describe_sizes
from app.samplers.table import valid_samplers

app = typer.Typer(help="The models of the folder of cards.", no_args_is_help=True)


@app.command("list")
def list_models(models: Folder = None) -> None:
    """One line for each card. files: here; or to pull, `gated` where a licence must be accepted first."""
    rows = table("model", "family", "parameters", "bytes", "files", "draws", "size", "steps", "guidance")
    cards = open_registry(read_settings(models=models)).all
    for card in cards.values():
        given = card.defaults
        names = "\n".join((card.id, *(f"= {alias}" for alias in card.aliases)))
        here = _files(card, cards)
        files = "gated" if card.gated and here != "here" else here
        steps, guidance = str(given.num_inference_steps), f"{given.guidance_scale:g}"
        amounts = count(card.parameters), decimal(card.bytes) if card.bytes else "-"
        rows.add_row(escape(names), card.family, *amounts, files, _draws(card), given.size, steps, guidance)
    print_table(rows)
    for error in cards.skipped.values():
        typer.echo(f"skipped: {error.message}", err=True)


@app.command()
def show(model: Annotated[str, typer.Argument(help="A model id or alias")], models: Folder = None) -> None:
    """Everything one card says."""
    registry = open_registry(read_settings(models=models))
    card = find(registry, model)
    rows = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
    words = {"here": "here", "pull": f"not here: instep models pull {card.id}", "none": "missing"}
    for name, value in _facts_of(card, words[_files(card, registry.cards)]).items():
        rows.add_row(name, escape(value))
    print_table(rows)


def _files(card: Card, cards: Mapping[str, Card]) -> Literal["here", "pull", "none"]:
    """Whether a card's files are here, or to be had from the Hub, those of other cards' parts too."""
    if ModelFolder(card, cards).here():
        return "here"
    owners = (cards[target.partition("/")[0]] for target in card.components.values())
    return "pull" if any(one.source.repo for one in (card, *owners)) else "none"


def _facts_of(card: Card, files: str) -> dict[str, str]:
    """A card in words, by the name of the fact. files: where they are."""
    given, limits, schedule, source = card.defaults, card.limits, card.schedule, card.source
    gated = {}
    if card.gated:
        from app.checkpoints.hub import page  # late: the Hub library takes a third of a second

        gated = {"gated": f"accept its licence at {page(str(source.repo))}, and set HF_TOKEN"}
    return {
        "id": card.id,
        "aliases": ", ".join(card.aliases) or "none",
        "description": card.description or "none",
        "license": card.license or "not said",
        **gated,
        "family": card.family,
        "draws": _draws(card),
        "parameters": f"{card.parameters:,} in the network" if card.parameters else "not said",
        "bytes": f"{decimal(card.bytes)} of weights" if card.bytes else "not said",
        "card": str(card.file),
        "source": source.path if source.path is not None else f"{source.repo}@{source.revision or 'main'}",
        "files": files,
        **{f"file {part}": file for part, file in card.files.items()},
        **{f"shared {part}": target for part, target in card.components.items()},
        "schedule": f"{schedule.kind}, predicts {schedule.prediction}, spacing {schedule.spacing}",
        "samplers": ", ".join(valid_samplers(schedule)),
        "default sampler": f"{given.sampler}, {given.num_inference_steps} steps, guidance {given.guidance_scale:g}",
        "default size": given.size,
        "sizes": describe_sizes(limits.sizes),
        "limits": f"{limits.num_inference_steps} steps, guidance {limits.guidance_scale:g}, {limits.n} images",
    }


def _draws(card: Card) -> str:
    return f"{len(card.labels)} classes" if card.draws_classes else "prompts"


def count(parameters: int | None) -> str:
    """Parameters in words: 8.06 B, 675 M."""
    if not parameters:
        return "-"
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"


def table(*columns: str) -> Table:
    """A table without lines; amounts stand at the right."""
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        number = column in ("parameters", "bytes", "steps", "guidance")
        made.add_column(column, overflow="fold", justify="right" if number else "left")
    return made


def print_table(rows: Table) -> None:
    """As wide as it needs when the output is not a terminal, so that it can be searched."""
    console = Console()
    console.print(rows) if console.is_terminal else Console(width=1000).print(rows)
