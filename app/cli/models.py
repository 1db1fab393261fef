"""`instep models list | show`: what the cards say; and whether their files bear them out, for `check`.

Knows nothing of devices: nothing is loaded onto one.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from app.cards.card import Card, read_cards
from app.cards.folder import ModelFolder
from app.cards.noise import changes, schedule_of
from app.cli.bodies import find, open_registry
from app.cli.serve import Folder, read_settings
from app.errors import CheckpointError, InstepError, LoadError, NotDownloaded, plain
from app.jobs.body import describe_sizes
from app.samplers.table import compile_table, valid_samplers

app = typer.Typer(help="The models of the folder of cards.", no_args_is_help=True)


@app.command("list")
def list_models(models: Folder = None) -> None:
    """One line for each card. files: here; or to pull, `gated` where a licence must be accepted first."""
    rows = table("model", "family", "parameters", "bytes", "files", "draws", "size", "steps", "guidance")
    cards = open_registry(read_settings(models=models)).all
    for card in cards.values():
        given = card.defaults
        names = "\n".join((card.id, *(f"= {alias}" for alias in card.aliases)))
        files = (
            "here"
            if ModelFolder(card, cards).here()
            else "gated"
            if card.gated
            else "pull"
            if on_hub(card, cards)
            else "none"
        )
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
    for name, value in facts_of(card, where(card, registry.cards)).items():
        rows.add_row(name, escape(value))
    print_table(rows)


def on_hub(card: Card, cards: Mapping[str, Card]) -> bool:
    """Whether any of its files are to be had from the Hub, those that other cards give it too."""
    givers = (cards[target.partition("/")[0]] for target in card.components.values())
    return any(one.source.repo for one in (card, *givers))


def where(card: Card, cards: Mapping[str, Card]) -> str:
    """Whether a card's files are on this machine, and what to do when not."""
    if ModelFolder(card, cards).here():
        return "here"
    return f"not here: instep models pull {card.id}" if on_hub(card, cards) else "missing"


def facts_of(card: Card, files: str) -> dict[str, str]:
    """A card in words, by the name of the fact. files: where they are."""
    given, limits, schedule = card.defaults, card.limits, card.schedule
    source = (
        card.source.path if card.source.path is not None else f"{card.source.repo}@{card.source.revision or 'main'}"
    )
    return {
        "id": card.id,
        "aliases": ", ".join(card.aliases) or "none",
        "description": card.description or "none",
        "license": card.license or "not said",
        **({"gated": f"accept its licence at {_page(card)}, and set HF_TOKEN"} if card.gated else {}),
        "family": card.family,
        "draws": _draws(card),
        "parameters": f"{card.parameters:,} in the network" if card.parameters else "not said",
        "bytes": f"{decimal(card.bytes)} of weights" if card.bytes else "not said",
        "card": str(card.folder / "card.toml"),
        "source": str(source),
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


def check_folder(folder: Path, threads: int) -> dict[str, tuple[str, str]]:
    """(state, detail) of every card by its folder's name: "ok", "absent" (not downloaded), "broken"."""
    files = sorted(folder.glob("*/card.toml"))
    if not files:
        raise LoadError(f"no cards in {folder}: expected {folder}/<id>/card.toml")
    cards = read_cards(folder)
    skipped = {plain(file.parent.name): ("broken", error.message) for file, error in cards.skipped.items()}
    return skipped | {plain(card.folder.name): _check_files(card, cards, threads) for card in cards.values()}


def _check_files(card: Card, cards: dict[str, Card], threads: int) -> tuple[str, str]:
    """Whether the card's defaults compile and the model builds from its parts, as the pool builds it, on the CPU."""
    # NOTE: imported late: torch and the model libraries take seconds, and only this command needs them.
    import torch

    from app.checkpoints.parts import build_family, build_parts, read_parts

    try:
        check_facts(card)
        read_parts(card, cards)
    except NotDownloaded as error:
        return "absent", error.message
    except InstepError as error:
        return "broken", error.message
    torch.set_num_threads(threads)
    device, dtype = torch.device("cpu"), torch.bfloat16
    try:
        parts = build_parts(card, cards, device, dtype)
        with torch.inference_mode():
            build_family(card, parts, device, dtype).prepare()
    except LoadError as error:
        return "broken", error.message
    except Exception as error:
        return "broken", f"cannot be loaded ({type(error).__name__})"
    return "ok", f"{len(parts)} parts{_overruled(card, ModelFolder(card, cards).path)}"


def _overruled(card: Card, folder: Path) -> str:
    """What the folder's scheduler_config.json says otherwise than the card, which is what counts."""
    try:
        found = changes(card.schedule, schedule_of(folder, card.schedule.model_dump()))
    except CheckpointError as error:
        return f"; the card does not follow {error.message}"
    return f"; its scheduler_config.json differs from the card: {', '.join(found)}" if found else ""


def check_facts(card: Card) -> None:
    """Raises InstepError when the card's own defaults make no table of coefficients."""
    compile_table(card.schedule, card.defaults.sampler, card.defaults.num_inference_steps, tokens=256)


def _draws(card: Card) -> str:
    return f"{len(card.labels)} classes" if card.draws_classes else "prompts"


def count(parameters: int | None) -> str:
    """Parameters in words: 8.06 B, 675 M."""
    if not parameters:
        return "-"
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"


def _page(card: Card) -> str:
    # NOTE: imported late: the Hub library takes a third of a second.
    from app.checkpoints.hub import page

    return page(str(card.source.repo))


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
