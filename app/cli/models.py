"""`instep models list | show | check`: the cards as tables, and whether cards and files are sound."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.markup import escape
from rich.table import Table

from app.cards.card import Card, read_cards
from app.cards.folder import ModelFolder
from app.cli.bodies import find, open_registry
from app.cli.serve import Folder, read_settings
from app.errors import LoadError, plain
from app.samplers.table import valid_samplers
from app.settings import Settings
from app.worker import plan

# NOTE: app.checkpoints is imported late: torch and the model libraries take seconds, the Hub library a third of one.
if TYPE_CHECKING:
    from app.checkpoints.inventory import Fit, Found, Inventory

app = typer.Typer(help="The models of the folder of cards.", no_args_is_help=True)


@app.command("list")
def list_models(models: Folder = None) -> None:
    """One line for each card. files: here; or to pull, `gated` where a licence must be accepted first."""
    rows = _table("model", "family", "parameters", "bytes", "files", "draws", "size", "steps", "guidance")
    cards = open_registry(read_settings(models=models)).all
    for card in cards.values():
        defaults = card.defaults
        names = "\n".join((card.id, *(f"= {alias}" for alias in card.aliases)))
        here = _files(card, cards)
        files = "gated" if card.gated and here != "here" else here
        steps, guidance = str(defaults.num_inference_steps), f"{defaults.guidance_scale:g}"
        amounts = _count(card.parameters), decimal(card.bytes) if card.bytes else "-"
        rows.add_row(escape(names), card.family, *amounts, files, _draws(card), defaults.size, steps, guidance)
    _print(rows)
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
    _print(rows)


def _files(card: Card, cards: Mapping[str, Card]) -> Literal["here", "pull", "none"]:
    """Whether a card's files are here, or to be had from the Hub, those of other cards' parts too."""
    if ModelFolder(card, cards).here():
        return "here"
    owners = (cards[target.partition("/")[0]] for target in card.components.values())
    return "pull" if any(one.source.repo for one in (card, *owners)) else "none"


def _facts_of(card: Card, files: str) -> dict[str, str]:
    """A card in words, by the name of the fact. files: where they are."""
    usual, limits, schedule, source = card.defaults, card.limits, card.schedule, card.source
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
        "default sampler": f"{usual.sampler}, {usual.num_inference_steps} steps, guidance {usual.guidance_scale:g}",
        "default size": usual.size,
        "sizes": str(limits.sizes),
        "limits": f"{limits.num_inference_steps} steps, guidance {limits.guidance_scale:g}, {limits.n} images",
    }


def _draws(card: Card) -> str:
    return f"{len(card.labels)} classes" if card.draws_classes else "prompts"


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
        return _check_cards(path or settings.models, plan.threads(settings))
    if not path.exists():
        raise LoadError(f"{path}: there is no such file or folder")
    from app.checkpoints.inventory import identify

    registry = open_registry(settings)
    found = identify(path.absolute(), registry.cards)
    found.check()
    _print_found(found, settings)
    if "transformer" in found.bases[0].parts:
        _print_next(found, registry.cards, settings)


def _check_cards(folder: Path, threads: int) -> None:
    """A line for each card of the folder. Raises LoadError when a model is broken."""
    states = check_folder(folder, threads)
    rows = _table("model", "state", "detail")
    for name, (state, detail) in states.items():
        rows.add_row(escape(name), state, escape(detail))
    _print(rows)
    broken = [name for name, (state, _) in states.items() if state == "broken"]
    if broken:
        raise LoadError(f"{len(broken)} of {len(states)} models are broken: {', '.join(broken)}")


def check_folder(folder: Path, threads: int) -> dict[str, tuple[str, str]]:
    """(state, detail) of every card by its folder's name: "ok", "absent" (not downloaded), "broken"."""
    files = sorted(folder.glob("*/card.toml"))
    if not files:
        raise LoadError(f"no cards in {folder}: expected {folder}/<id>/card.toml")
    import torch

    from app.checkpoints.parts import check_card

    torch.set_num_threads(threads)
    cards = read_cards(folder)
    skipped = {plain(file.parent.name): ("broken", error.message) for file, error in cards.skipped.items()}
    return skipped | {plain(card.folder.name): check_card(card, cards) for card in cards.values()}


def _print_found(found: Inventory, settings: Settings) -> None:
    """Which cards fit, the state of each part, and the memory that they take."""
    from app.checkpoints.inventory import flag, short

    fit = found.bases[0]
    networks = {part: one for part, one in fit.own.items() if one.state}
    names = [base.card.id for base in found.bases]
    if found.pickled:
        typer.echo(f"{found.path.name} is a torch file, which a server does not load")
    unsure = ": the same shapes, so the files cannot tell which" if len(names) > 1 else ""
    typer.echo(f"fits {', '.join(names)}{unsure}")
    whole = "transformer" in networks
    missing = list(dict.fromkeys([*fit.missing, *fit.odd])) if whole else []
    memory = _memory_of(fit, [*networks, *missing], settings)
    rows = _table("part", "state", "parameters", "bytes", "in memory")
    for part in [*networks, *missing]:
        there = networks.get(part)
        parameters = fit.counts(part)[0] if part in memory else 0
        stored = decimal(sum(value.nbytes for value in there.state.values())) if there else "-"
        needs = decimal(memory[part]) if part in memory else "-"
        rows.add_row(part, escape(_state(fit, part, there)), _count(parameters), stored, needs)
    _print(rows)
    if whole:
        typer.echo(_budget(fit, networks, memory, settings))
        return
    if found.others:
        typer.echo(f"besides, {len(found.others)} tensors that no layout has, the first {short(found.others[0])}")
    typer.echo(f"no network is in it: give it to `instep models add` beside one ({', '.join(map(flag, networks))})")


def _state(fit: Fit, part: str, there: Found | None) -> str:
    """How a part is stored, or why it is not usable, or what its absence means."""
    from app.checkpoints.inventory import short
    from app.families import FAMILIES

    if part in fit.odd:
        return f"not usable: {short(fit.odd[part])}"
    if there:
        formats = sorted({str(value.dtype).removeprefix("torch.") for value in there.state.values()})
        return f"stored as {', '.join(formats)}"
    if part in FAMILIES[fit.card.family].required:
        return "missing, and needed"
    if part.startswith("tokenizer"):
        return f"missing; text_encoder{part.removeprefix('tokenizer')} needs it"
    return f"missing; {fit.card.facts.without.get(part, 'it can do without')}"


def _memory_of(fit: Fit, parts: Iterable[str], settings: Settings) -> dict[str, int]:
    """Bytes of each of these parts that is a network of the card, as this machine would load it."""
    import torch

    from app.checkpoints.parts import part_dtype
    from app.worker.process import resolve_dtype

    device = plan.devices(settings.devices)[0]
    dtype = resolve_dtype(settings, device)
    networks = filter(fit.network, parts)
    return {part: fit.counts(part)[1] * part_dtype(part, torch.device(device), dtype).itemsize for part in networks}


def _budget(fit: Fit, parts: Iterable[str], memory: dict[str, int], settings: Settings) -> str:
    """Bytes by phase, with a VAE in any case, against what weights may take here."""
    from app.families import FAMILIES
    from app.pool.budget import budgets

    family, devices = FAMILIES[fit.card.family], plan.devices(settings.devices)
    budget, _ = budgets(settings, devices[0], devices)
    there = {*parts, *family.required}
    taken = {
        phase: sum(memory.get(part, 0) for part in names if part in there) for phase, names in family.phases.items()
    }
    each = ", ".join(f"{phase} {decimal(size)}" for phase, size in taken.items() if size)
    fits = "fits" if sum(taken.values()) <= budget else "fits in turns, one phase at a time"
    if max(taken.values()) > budget:
        fits = "does not fit"
    return f"memory on {devices[0]}: {each}; weights may take {decimal(budget)} here: {fits}"


def _print_next(found: Inventory, cards: Mapping[str, Card], settings: Settings) -> None:
    """Make the card that the next command would make, throw it away, and say that command.

    Raises LoadError, as `instep models add` does: no model can be made of it. A .pt is for `instep models convert`.
    """
    from app.checkpoints.inventory import new_folder

    made, path = found.bases[0], found.path
    like = made.card.id
    if found.pickled:
        words = ["instep", "models", "convert", str(path), str(settings.models / f"my-{like}"), "--vae"]
        dit = f"{shlex.join(words)} SD-VAE-FT-EMA"
        return typer.echo(f"next: {dit if made.card.facts.torch_files else 'save its tensors as safetensors'}")
    words = ["instep", "models", "add", str(path), "--like", like]
    if not made.whole and made.missing:
        made.take_rest(made.card)
        words += ["--rest", like]
    made.refuse_gaps()
    with tempfile.TemporaryDirectory(prefix="instep-check-") as folder:
        made.write(Path(folder) / new_folder(path, settings.models, cards, None).name)
    for line in made.own_schedule():
        typer.echo(line)
    typer.echo(f"next: {shlex.join(words)}")


def _count(parameters: int | None) -> str:
    """Parameters in words: 8.06 B, 675 M."""
    if not parameters:
        return "-"
    return f"{parameters / 1e9:.2f} B" if parameters >= 1e9 else f"{parameters / 1e6:.3g} M"


def _table(*columns: str) -> Table:
    """A table without lines; amounts stand at the right."""
    made = Table(box=None, padding=(0, 2, 0, 0), header_style="bold")
    for column in columns:
        number = column in ("parameters", "bytes", "steps", "guidance")
        made.add_column(column, overflow="fold", justify="right" if number else "left")
    return made


def _print(rows: Table) -> None:
    """As wide as it needs when the output is not a terminal, so that it can be searched."""
    console = Console()
    console.print(rows) if console.is_terminal else Console(width=1000).print(rows)
