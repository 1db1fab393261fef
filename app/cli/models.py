"""`instep models list | show | check`, `instep loras list | check`: tables of cards and LoRAs; what is broken."""

from __future__ import annotations

import shlex
import tempfile
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.filesize import decimal

from app.cards.adapters import Adapter
from app.cards.card import Card
from app.cards.cards import read_cards
from app.cards.folder import WITHOUT, ModelFolder
from app.cli.options import Folder, find, open_registry, read_settings
from app.cli.paint import facts_table, show_tables, table
from app.errors import LoadError, plain
from app.jobs.compare import parameters_in_words
from app.samplers.grids import GRIDS
from app.samplers.table import valid_grids, valid_samplers
from app.settings import Settings
from app.worker import plan

# NOTE: app.checkpoints is imported late: torch and the model libraries take seconds, the Hub library a third of one.
if TYPE_CHECKING:
    from app.checkpoints.inventory import Fit, Inventory

app = typer.Typer(help="List, check, download and add models.", no_args_is_help=True)
loras = typer.Typer(help="List and check LoRAs.", no_args_is_help=True)


@app.command("list")
def list_models(models: Folder = None) -> None:
    """Print a line for each card. files: here, or to pull; `gated` if you have to accept a licence first."""
    cards = open_registry(read_settings(models=models)).all
    show_tables(table([_line(card, cards) for card in cards.values()], ("model", "family", "files", "draws", "size")))
    for error in cards.skipped.values():
        typer.echo(f"skipped: {error.message}", err=True)


def _line(card: Card, cards: Mapping[str, Card]) -> dict[str, str]:
    here = _files(card, cards)
    return {
        "model": "\n".join((card.id, *(f"= {alias}" for alias in card.aliases))),
        "family": f"{card.family}\nas {card.base}" if card.base else card.family,
        "parameters": parameters_in_words(card.parameters) or "-",
        "bytes": decimal(card.bytes) if card.bytes else "-",
        "files": "gated" if card.gated and here != "here" else here,
        "draws": _draws(card),
        "size": card.defaults.size,
        "steps": str(card.defaults.num_inference_steps),
        "guidance": f"{card.defaults.guidance_scale:g}",
    }


@app.command()
def show(model: Annotated[str, typer.Argument(help="A model id or alias")], models: Folder = None) -> None:
    """Print everything that a card says."""
    registry = open_registry(read_settings(models=models))
    show_tables(facts_table(_facts_of(find(registry, model), registry.cards)))


def _files(card: Card, cards: Mapping[str, Card]) -> Literal["here", "pull", "none"]:
    """Whether a card's files are here, or to be had from the Hub, those of other cards' parts too."""
    if ModelFolder(card, cards).here():
        return "here"
    owners = (cards[target.partition("/")[0]] for target in card.components.values())
    return "pull" if any(one.source.repo for one in (card, *owners)) else "none"


def _facts_of(card: Card, cards: Mapping[str, Card]) -> dict[str, str]:
    """A card in words, by the name of the fact."""
    usual, limits, schedule, source = card.defaults, card.limits, card.schedule, card.source
    words = {"here": "here", "pull": f"not here: instep models pull {card.id}", "none": "missing"}
    gated = {}
    if card.gated:
        from app.checkpoints.hub import page  # late: the Hub library takes a third of a second

        gated = {"gated": f"accept its licence at {page(str(source.repo))}, and set HF_TOKEN"}
    base = " + ".join((card.base, *(f"{one.name}:{one.weight:g}" for one in card.loras)))
    return {
        "id": card.id,
        "aliases": ", ".join(card.aliases) or "none",
        "description": card.description or "none",
        "license": card.license or "unknown",
        **gated,
        "family": card.family,
        **({"base": base} if card.base else {}),
        "draws": _draws(card),
        "parameters": f"{card.parameters:,} in the network" if card.parameters else "unknown",
        "bytes": f"{decimal(card.bytes)} of weights" if card.bytes else "unknown",
        "card": str(card.file),
        "source": source.path if source.path is not None else f"{source.repo}@{source.revision or 'main'}",
        "files": words[_files(card, cards)],
        **{f"file {part}": file for part, file in card.files.items()},
        **{f"shared {part}": target for part, target in card.components.items()},
        "schedule": f"{schedule.kind}, predicts {schedule.prediction}, spacing {schedule.spacing}",
        "samplers": ", ".join(samplers := valid_samplers(schedule)),
        "schedules": f"{', '.join(GRIDS)} with {', '.join(name for name in samplers if valid_grids(name))}",
        "default sampler": f"{usual.sampler}, {usual.num_inference_steps} steps, guidance {usual.guidance_scale:g}",
        "default size": usual.size,
        "default strength": f"{usual.strength:g}",
        "sizes": str(limits.sizes),
        "limits": f"{limits.num_inference_steps} steps, guidance {limits.guidance_scale:g}, {limits.n} images",
    }


def _draws(card: Card) -> str:
    return f"{len(card.labels)} classes" if card.draws_classes else "prompts"


def check(
    path: Annotated[Path | None, typer.Argument(help="Files of yours; without them, all cards are checked")] = None,
    models: Folder = None,
) -> None:
    """Check the cards and their files, or with PATH, say which card fits these files and what is missing.

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
    found = identify(path.absolute(), registry.cards.models)
    found.check()
    _print_found(found, settings)
    if found.bases[0].card.network in found.bases[0].parts:
        _print_next(found, registry.cards, settings)


def _check_cards(folder: Path, threads: int) -> None:
    """A line for each card of the folder. Raises LoadError when a model is broken."""
    states = check_folder(folder, threads)
    rows = [{"model": name, "state": state, "detail": detail} for name, (state, detail) in states.items()]
    show_tables(table(rows, ("model", "state", "detail")))
    if broken := [name for name, (state, _) in states.items() if state == "broken"]:
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
    return skipped | {plain(card.folder.name): check_card(card, cards) for card in cards.models.values()}


@loras.command("list")
def list_loras(models: Folder = None) -> None:
    """Print a line for each LoRA in the folder of INSTEP_LORAS, by default `loras` in the folder of cards."""
    _show_loras([], models)


@loras.command("check")
def check_loras(
    names: Annotated[list[str] | None, typer.Argument(help="Names of LoRAs, or files; by default all")] = None,
    models: Folder = None,
) -> None:
    """Read LoRAs as a server does, and say which models they fit, and which tensors have no place there.

    Exit code 1 when one fits no model.
    """
    found = _show_loras(names or [], models, whole=True)
    for one in found:
        for model, fit in one.fits.items():
            typer.echo("".join(f"{one.name}: {key} has no place in {model}\n" for key in fit.unmatched), nl=False)
    if broken := [one.name for one in found if not one.fits]:
        raise LoadError(f"{len(broken)} of {len(found)} LoRAs fit no model: {', '.join(broken)}")


def _show_loras(words: list[str], models: str | None, *, whole: bool = False) -> list[Adapter]:
    """Print a table of these LoRAs, by name or file, or of all. whole: read them, not their headers alone."""
    settings = read_settings(models=models)
    cards, folder = open_registry(settings).all.models, settings.adapters or settings.models / "loras"
    from app.checkpoints.adapters import survey

    named = (Path(word) if Path(word).is_file() else folder / f"{word}.safetensors" for word in words)
    found = [one for path in (named if words else [folder]) for one in survey(path.absolute(), cards, whole)]
    show_tables(table(list(map(_lora, found)), ("lora", "fits", "trigger words", "detail")))
    return found


def _lora(adapter: Adapter) -> dict[str, str]:
    fits, left = adapter.fits.values(), sum(len(fit.unmatched) for fit in adapter.fits.values())
    return {
        "lora": adapter.name,
        "fits": "\n".join(adapter.fits) or "none",
        "rank": "\n".join(str(fit.rank) for fit in fits),
        "modules": "\n".join(str(fit.modules) for fit in fits),
        "bytes": "\n".join(decimal(fit.bytes) for fit in fits),
        "trigger words": ", ".join(adapter.trigger_words),
        "detail": adapter.problem or (f"{left} tensors have no place" if left else adapter.description),
    }


def _print_found(found: Inventory, settings: Settings) -> None:
    """Which cards fit, the state of each part, and the memory that they take."""
    from app.checkpoints.inventory import flag, short

    fit, names = found.bases[0], [base.card.id for base in found.bases]
    networks = [part for part, one in fit.own.items() if one.state]
    if found.pickled:
        typer.echo(f"{found.path.name} is a torch file, which a server does not load")
    unsure = ": the same shapes, so the files cannot tell which" if len(names) > 1 else ""
    typer.echo(f"fits {', '.join(names)}{unsure}")
    whole = fit.card.network in networks
    parts = list(dict.fromkeys([*networks, *fit.missing, *fit.odd])) if whole else networks
    memory = _memory_of(fit, parts, settings)
    show_tables(table([_row(fit, part, memory) for part in parts], ("part", "state")))
    if found.others:
        typer.echo(
            f"{len(found.others)} tensors belong to no layout that is known here, the first: {short(found.others[0])}"
        )
    if whole:
        typer.echo(_budget(fit, networks, memory, settings))
        return
    typer.echo(f"no network is in it: give it to `instep models add` beside one ({', '.join(map(flag, networks))})")


def _row(fit: Fit, part: str, memory: Mapping[str, int]) -> dict[str, str]:
    """A part of the table: how it is stored, why it is not usable or what its absence means, and its sizes."""
    from app.checkpoints.inventory import short

    there = fit.own.get(part)
    tensors = there.state.values() if there else ()
    if part in fit.odd:
        state = f"not usable: {short(fit.odd[part])}"
    elif there:
        state = f"stored as {', '.join(sorted({str(one.dtype).removeprefix('torch.') for one in tensors}))}"
    elif part.startswith("tokenizer"):
        state = f"missing; text_encoder{part.removeprefix('tokenizer')} needs it"
    elif part in fit.needed:
        state = "missing, and needed"
    else:
        state = f"missing; {WITHOUT[fit.card.family].get(part, 'it can do without')}"
    return {
        "part": part,
        "state": state,
        "parameters": parameters_in_words(fit.counts(part)[0] if part in memory else None) or "-",
        "bytes": decimal(sum(one.nbytes for one in tensors)) if there else "-",
        "in memory": decimal(memory[part]) if part in memory else "-",
    }


def _memory_of(fit: Fit, parts: Iterable[str], settings: Settings) -> dict[str, int]:
    """Bytes of each of these parts that is a network of the card, as this machine would load it."""
    import torch

    from app.checkpoints.parts import part_dtype
    from app.worker.process import resolve_dtype

    device = torch.device(plan.devices(settings.devices)[0])
    dtype = resolve_dtype(settings, str(device))
    return {part: fit.counts(part)[1] * part_dtype(part, device, dtype).itemsize for part in filter(fit.network, parts)}


def _budget(fit: Fit, networks: Iterable[str], memory: Mapping[str, int], settings: Settings) -> str:
    """Bytes of these networks and the required ones by phase, against what weights may take here."""
    from app.families import FAMILIES
    from app.pool.budget import budgets

    family, devices = FAMILIES[fit.card.family], plan.devices(settings.devices)
    parts = {*networks, *family.required}
    budget, _ = budgets(settings, devices[0], devices)
    taken = {phase: sum(memory.get(one, 0) for one in names if one in parts) for phase, names in family.phases.items()}
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
        return typer.echo(f"next: {dit if made.card.has('torch_files') else 'save its tensors as safetensors'}")
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
