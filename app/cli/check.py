"""`instep models check`: whether cards and their files are sound, or which card fits files that a user has.

How files are compared is in app/checkpoints/identify.py; this prints what was found and what is missing.
"""

from __future__ import annotations

import shlex
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.filesize import decimal
from rich.markup import escape

from app.cards.card import Card
from app.cards.catalog import Registry
from app.cli.add import free_id
from app.cli.bodies import open_registry
from app.cli.compose import (
    LOST,
    bases,
    no_card,
    own_schedule,
    refuse_gaps,
    refuse_odd,
    short,
    start,
    take_rest,
)
from app.cli.makings import write
from app.cli.models import check_folder, count, print_table, table
from app.cli.serve import Folder, read_settings
from app.errors import CheckpointError, LoadError
from app.settings import Settings
from app.worker import plan

if TYPE_CHECKING:
    from app.checkpoints.identify import Report, Shipped


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
    from app.checkpoints.identify import identify

    registry = open_registry(settings)
    report = identify(path.absolute(), registry.cards)
    refuse_odd(report)
    if not report.fits:
        raise CheckpointError(no_card(report))
    report.fits = bases(report)
    tell(report, settings)
    if "transformer" in report.fits[0][1]:
        judge(report, registry, settings)


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
    else:
        if report.others:
            typer.echo(f"besides, {len(report.others)} tensors that no layout has, the first {short(report.others[0])}")
        typer.echo(f"no network is in it: give it to `instep models add` beside one ({', '.join(map(_flag, pieces))})")


def bytes_each(one: Shipped, settings: Settings) -> dict[str, int]:
    """Bytes of one number of each part of a card as this machine would load it."""
    import torch

    from app.checkpoints.parts import part_dtype
    from app.families.components import has_weights
    from app.worker.process import resolve_dtype

    device = plan.devices(settings.devices)[0]
    dtype = resolve_dtype(settings, device)
    named = (part for part, kind in one.classes.items() if has_weights(kind))
    return {part: part_dtype(part, torch.device(device), dtype).itemsize for part in named}


def _memory(one: Shipped, parts: list[str], each: dict[str, int], settings: Settings) -> str:
    """Bytes by phase, with a VAE in any case, against what weights may take here."""

    from app.checkpoints.identify import phases
    from app.families import FAMILIES
    from app.pool.budget import budgets

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


def judge(report: Report, registry: Registry, settings: Settings) -> None:
    """Make the card that the next command would make, throw it away, and say that command.

    Raises LoadError, as `instep models add` does: no model can be made of it. A .pt is for `instep models convert`.
    """
    (one, pieces), path = report.fits[0], report.path
    if report.pickled:
        words = ["instep", "models", "convert", str(path), str(settings.models / f"my-{one.card.id}"), "--vae"]
        dit = f"{shlex.join(words)} SD-VAE-FT-EMA"
        return typer.echo(f"next: {dit if one.card.facts.torch_files else 'save its tensors as safetensors'}")
    makings = start(report, registry, one.card.id)
    words = ["instep", "models", "add", str(path), "--like", one.card.id]
    if path.is_file() and one.missing(pieces):
        take_rest(makings, one.card.id, registry)
        words += ["--rest", one.card.id]
    refuse_gaps(makings, path)
    with tempfile.TemporaryDirectory(prefix="instep-check-") as folder:
        write(Path(folder) / free_id(path, registry, settings.models), makings, registry.cards)
    for line in own_schedule(makings):
        typer.echo(line)
    typer.echo(f"next: {shlex.join(words)}")
