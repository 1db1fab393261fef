"""`instep models check`: whether cards and their files are sound, or which card fits files that a user has.

Knows nothing of how files are compared (app/pool/identify.py): it says what was found, what is missing and what comes
next.
"""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape

from app.card import Card
from app.cli.bodies import open_registry
from app.cli.models import check_folder, count, print_table, table
from app.cli.serve import Folder, read_settings
from app.errors import CheckpointError, LoadError
from app.settings import Settings
from app.worker import plan

if TYPE_CHECKING:
    from app.pool.identify import Report, Shipped

LOST = {
    ("sd3", "text_encoder"): "it is zeros without: prompts are followed less well",
    ("sd3", "text_encoder_2"): "it is zeros without: prompts are followed less well",
    ("sd3", "text_encoder_3"): "it is zeros without: long prompts and written words are followed less well",
    ("flux", "text_encoder"): "it is zeros without: pictures keep less to the prompt's style",
    ("flux", "text_encoder_2"): "it is zeros without: prompts are hardly followed",
}
"""What a model loses with a part that it can do without."""


def check(
    path: Annotated[Path | None, typer.Argument(help="Files of yours: which card fits them? None: the cards")] = None,
    models: Folder = None,
) -> None:
    """Whether the cards and their files are sound; with PATH, which card fits these files and what is missing.

    PATH is a folder of cards, a diffusers folder, a safetensors file (in the authors' own layout too) or a .pt. Exit
    code 1 when a model is broken or nothing fits.
    """
    settings = read_settings(models=models)
    if path is None or any(path.glob("*/card.toml")):
        return check_cards(path or settings.models, plan.threads(settings))
    if not path.exists():
        raise LoadError(f"{path}: there is no such file or folder")
    from app.pool.identify import identify

    report = identify(path, open_registry(settings).cards)
    if not report.fits:
        raise CheckpointError(no_card(report))
    return tell(report, settings)


def check_cards(folder: Path, threads: int) -> None:
    """A line for each card of the folder. Raises LoadError when a model is broken."""
    states = check_folder(folder, threads)
    rows = table("model", "state", "detail")
    for name, (state, detail) in states.items():
        rows.add_row(escape(name), state, escape(detail))
    print_table(rows)
    broken = [name for name, (state, _) in states.items() if state == "broken"]
    if broken:
        raise LoadError(f"{len(broken)} of {len(states)} models are broken: {', '.join(broken)}")


def no_card(report: Report) -> str:
    """What is said when nothing fits: the nearest card and the first difference."""
    if report.nearest is None:
        names = next((list(piece.state) for piece in report.pieces.values() if piece.state), ["none"])
        return f"{report.path}: in no layout that is known here; its tensors: {', '.join(map(short, names[:3]))} ..."
    card, part, found = report.nearest
    more = f", and {len(found) - 1} more differences" if len(found) > 1 else ""
    return f"{report.path}: fits no card; the nearest is {card.id}, whose {part} is another: {short(found[0])}{more}"


def short(text: str) -> str:
    """What a file says, fit for a line."""
    return text if len(text) <= 200 else f"{text[:200]}..."


def tell(report: Report, settings: Settings) -> None:
    """Which cards fit, part by part, the memory it takes, and the next command."""
    one, pieces = report.fits[0]
    names = [shipped.card.id for shipped, _ in report.fits]
    if report.pickled:
        typer.echo(f"{report.path.name} is a torch file, which a server does not load")
    unsure = ": the same shapes, so the files cannot tell which" if len(names) > 1 else ""
    typer.echo(f"fits {', '.join(names)}{unsure}")
    each = bytes_each(one, settings)
    rows = table("part", "state", "parameters", "bytes", "in memory")
    missing = one.missing([*pieces, *report.tokenizers]) if "transformer" in pieces else []
    for part in [*pieces, *missing]:
        there = pieces.get(part)
        parameters, numbers = one.counts(part) if part in each else (0, 0)
        state = f"stored as {there.formats}" if there else _absent(one.card, part, pieces)
        if part in report.odd:
            state = f"not usable: {short(report.odd[part])}"
        memory = decimal(numbers * each[part]) if numbers else "-"
        rows.add_row(part, escape(state), count(parameters), decimal(there.bytes) if there else "-", memory)
    print_table(rows)
    if "transformer" in pieces:
        typer.echo(_memory(one, list(pieces), each, settings))
        typer.echo(f"next: {_next(report, one, settings.models)}")
    else:
        if report.others:
            typer.echo(f"besides, {len(report.others)} tensors that no layout has, the first {short(report.others[0])}")
        typer.echo(f"no network is in it: give it to `instep models add` beside one ({', '.join(map(_flag, pieces))})")


def bytes_each(one: Shipped, settings: Settings) -> dict[str, int]:
    """Bytes of one number of each part of a card as this machine would load it."""
    import torch

    from app.families.components import has_weights
    from app.pool.building import part_dtype
    from app.pool.layout import Part
    from app.worker.process import resolve_dtype

    device = plan.devices(settings.devices)[0]
    dtype = resolve_dtype(settings, device)
    named = {part: Part(part, kind, one.folder / part) for part, kind in one.classes.items() if has_weights(kind)}
    return {name: part_dtype(part, torch.device(device), dtype).itemsize for name, part in named.items()}


def _memory(one: Shipped, parts: list[str], each: dict[str, int], settings: Settings) -> str:
    """Bytes by phase, with a VAE in any case, against what weights may take here."""

    from app.families import FAMILIES
    from app.pool.budget import budgets
    from app.pool.identify import phases

    devices = plan.devices(settings.devices)
    budget, _ = budgets(settings, devices[0], devices)
    taken = phases(one, {*parts, *FAMILIES[one.card.family].required}, each)
    said = ", ".join(f"{phase} {decimal(size)}" for phase, size in taken.items() if size)
    fits = "fits" if sum(taken.values()) <= budget else "fits in turns, one phase at a time"
    if max(taken.values()) > budget:
        fits = "does not fit"
    return f"memory on {devices[0]}: {said}; weights may take {decimal(budget)} here: {fits}"


def _absent(card: Card, part: str, pieces: object) -> str:
    from app.families import FAMILIES

    if part in FAMILIES[card.family].required:
        return "missing, and needed"
    if part.startswith("tokenizer"):
        return f"missing; text_encoder{part.removeprefix('tokenizer')} needs it"
    return f"missing; {LOST.get((card.family, part), 'it can do without')}"


def _flag(part: str) -> str:
    return f"--{part.replace('_', '-')}"


def _next(report: Report, one: Shipped, models: Path) -> str:
    """The command that makes a card of these files, or files that can have one."""
    if report.pickled and one.card.family == "dit":
        words = ["instep", "models", "convert", str(report.path), str(models / f"my-{one.card.id}"), "--vae"]
        return f"{shlex.join(words)} SD-VAE-FT-EMA"
    if report.pickled:
        return "save its tensors as safetensors"
    words = ["instep", "models", "add", str(report.path), "--like", one.card.id]
    if report.path.is_file() and one.missing(report.pieces):
        words += ["--rest", one.card.id]
    return shlex.join(words)
