"""`instep models check | add | convert`: whether cards and files are sound, and models made of a user's own files."""

from __future__ import annotations

import re
import shlex
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.filesize import decimal
from rich.markup import escape

from app.cards.card import read_cards
from app.cards.catalog import Registry
from app.cards.files import INDEX, read_labels
from app.cards.folder import ModelFolder
from app.cli.bodies import open_registry
from app.cli.models import count, print_table, table
from app.cli.serve import Folder, read_settings
from app.errors import LoadError, plain
from app.settings import Settings
from app.worker import plan

# NOTE: app.checkpoints is imported late: torch and the model libraries take seconds.
if TYPE_CHECKING:
    from app.checkpoints.identify import CardConfigs, FoundPart, Inventory

LABELLED = ("dit-xl-2-256", "dit-xl-2-512")
"""Cards whose index names the 1000 classes of ImageNet."""

Place = Annotated[
    Path | None, typer.Option(show_default=False, help="Where this part is: its folder, or a safetensors")
]


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
    from app.checkpoints.identify import identify

    registry = open_registry(settings)
    found = identify(path.absolute(), registry.cards)
    found.check()
    _print_found(found, settings)
    if "transformer" in found.bases[0][1]:
        _print_next(found, registry, settings)


def _check_cards(folder: Path, threads: int) -> None:
    """A line for each card of the folder. Raises LoadError when a model is broken."""
    states = check_folder(folder, threads)
    rows = table("model", "state", "detail")
    for name, (state, detail) in states.items():
        rows.add_row(escape(name), state, escape(detail))
    print_table(rows)
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
    one, parts = found.bases[0]
    names = [base.card.id for base, _ in found.bases]
    if found.pickled:
        typer.echo(f"{found.path.name} is a torch file, which a server does not load")
    unsure = ": the same shapes, so the files cannot tell which" if len(names) > 1 else ""
    typer.echo(f"fits {', '.join(names)}{unsure}")
    whole = "transformer" in parts
    missing = one.missing([*parts, *found.tokenizers]) if whole else []
    memory = _memory_of(one, settings)
    rows = table("part", "state", "parameters", "bytes", "in memory")
    for part in [*parts, *missing]:
        there = parts.get(part)
        parameters = one.counts(part)[0] if part in memory else 0
        stored = decimal(sum(value.nbytes for value in there.state.values())) if there else "-"
        needs = decimal(memory[part]) if part in memory else "-"
        rows.add_row(part, escape(_state(one, part, there, found)), count(parameters), stored, needs)
    print_table(rows)
    if whole:
        typer.echo(_budget(one, parts, memory, settings))
        return
    if found.others:
        from app.checkpoints.identify import short

        typer.echo(f"besides, {len(found.others)} tensors that no layout has, the first {short(found.others[0])}")
    flags = ", ".join(f"--{part.replace('_', '-')}" for part in parts)
    typer.echo(f"no network is in it: give it to `instep models add` beside one ({flags})")


def _state(one: CardConfigs, part: str, there: FoundPart | None, found: Inventory) -> str:
    """How a part is stored, or why it is not usable, or what its absence means."""
    from app.checkpoints.compose import LOST
    from app.checkpoints.identify import short
    from app.families import FAMILIES

    if part in found.odd:
        return f"not usable: {short(found.odd[part])}"
    if there:
        formats = sorted({str(value.dtype).removeprefix("torch.") for value in there.state.values()})
        return f"stored as {', '.join(formats)}"
    if part in FAMILIES[one.card.family].required:
        return "missing, and needed"
    if part.startswith("tokenizer"):
        return f"missing; text_encoder{part.removeprefix('tokenizer')} needs it"
    return f"missing; {LOST.get((one.card.family, part), 'it can do without')}"


def _memory_of(one: CardConfigs, settings: Settings) -> dict[str, int]:
    """Bytes of each network of a card as this machine would load it."""
    import torch

    from app.checkpoints.parts import part_dtype
    from app.families.components import has_weights
    from app.worker.process import resolve_dtype

    device = plan.devices(settings.devices)[0]
    dtype = resolve_dtype(settings, device)
    networks = (part for part, kind in one.classes.items() if has_weights(kind))
    return {part: one.counts(part)[1] * part_dtype(part, torch.device(device), dtype).itemsize for part in networks}


def _budget(one: CardConfigs, parts: Iterable[str], memory: dict[str, int], settings: Settings) -> str:
    """Bytes by phase, with a VAE in any case, against what weights may take here."""
    from app.families import FAMILIES
    from app.pool.budget import budgets

    family, devices = FAMILIES[one.card.family], plan.devices(settings.devices)
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


def _print_next(found: Inventory, registry: Registry, settings: Settings) -> None:
    """Make the card that the next command would make, throw it away, and say that command.

    Raises LoadError, as `instep models add` does: no model can be made of it. A .pt is for `instep models convert`.
    """
    from app.checkpoints.compose import draft

    (one, parts), path = found.bases[0], found.path
    if found.pickled:
        words = ["instep", "models", "convert", str(path), str(settings.models / f"my-{one.card.id}"), "--vae"]
        dit = f"{shlex.join(words)} SD-VAE-FT-EMA"
        return typer.echo(f"next: {dit if one.card.facts.torch_files else 'save its tensors as safetensors'}")
    made = draft(found, registry, one.card.id)
    words = ["instep", "models", "add", str(path), "--like", one.card.id]
    if path.is_file() and one.missing(parts):
        made.take_rest(one.card)
        words += ["--rest", one.card.id]
    made.refuse_gaps()
    with tempfile.TemporaryDirectory(prefix="instep-check-") as folder:
        made.write(Path(folder) / _free_id(path, registry, settings.models), registry.cards)
    for line in made.own_schedule():
        typer.echo(line)
    typer.echo(f"next: {shlex.join(words)}")


def add(
    path: Annotated[Path, typer.Argument(help="A diffusers folder, or a safetensors file in its authors' layout")],
    like: Annotated[str | None, typer.Option(help="The card whose settings it takes; none: the one that fits")] = None,
    name: Annotated[str | None, typer.Option("--id", help="Its id; none: made of the file's name")] = None,
    vae: Place = None,
    text_encoder: Place = None,
    text_encoder_2: Place = None,
    text_encoder_3: Place = None,
    tokenizers: Annotated[Path | None, typer.Option(help="Folder with tokenizer, tokenizer_2 ... in it")] = None,
    rest: Annotated[str | None, typer.Option(help="The card that gives the parts that are still missing")] = None,
    models: Folder = None,
) -> None:
    """Make a card for files of yours, where they are; `instep models check PATH` tells what they are and lack."""
    from app.checkpoints.compose import draft
    from app.checkpoints.identify import identify

    settings = read_settings(models=models)
    registry = open_registry(settings)
    path = path.absolute()
    found = identify(path, registry.cards)
    made = draft(found, registry, like)
    encoders = {"text_encoder": text_encoder, "text_encoder_2": text_encoder_2, "text_encoder_3": text_encoder_3}
    for part, place in {"vae": vae, **encoders}.items():
        if place is not None:
            made.take(part, place.absolute())
    if tokenizers is not None:
        made.take_tokenizers(tokenizers.absolute())
    if rest is not None:
        made.take_rest(registry.find(rest))
    made.refuse_gaps()
    model = name or _free_id(path, registry, settings.models)
    folder = _free_folder(model, registry, settings.models)
    made.write(folder, registry.cards)
    typer.echo(f"{model}: {folder / 'card.toml'}, like {made.like.card.id}; the weights stay where they are")
    for line in (*made.left_out(found), *made.own_schedule()):
        typer.echo(line)
    cards = read_cards(settings.models)
    draw = "instep serve" if cards[model].draws_classes else f'instep generate "a red apple" --model {model}'
    typer.echo(f"next: {draw if ModelFolder(cards[model], cards).here() else f'instep models pull {model}'}")


def _free_folder(model: str, registry: Registry, models: Path) -> Path:
    """The folder of a new model. Raises LoadError: its name is none, or is taken."""
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}", model):
        raise LoadError(f'"{model}" cannot be the id of a model: letters, digits, ".", "_", "-"')
    if _taken(model, registry, models):
        raise LoadError(f"{models / model}: there is a model of this name already; give another with --id")
    return models / model


def _free_id(path: Path, registry: Registry, models: Path) -> str:
    """An id made of the name of the files, with a number behind it where that one is taken."""
    named = re.sub(r"[^a-z0-9._]+", "-", (path.name if path.is_dir() else path.stem).lower()).strip("-._")[:58]
    ids = (f"{named or 'model'}{number}" for number in ("", *(f"-{count}" for count in range(2, 10_000))))
    return next(model for model in ids if not _taken(model, registry, models))


def _taken(model: str, registry: Registry, models: Path) -> bool:
    return (models / model).exists() or any(model in card.names for card in registry.cards.values())


def convert(
    file: Annotated[
        Path,
        typer.Argument(
            help="The authors' .pt, or one that their train.py saved (its EMA is taken); or a folder of diffusers' .bin"
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="Folder to write, <models>/<id>; it must not exist, or see --replace")],
    vae: Annotated[
        Path | None,
        typer.Option(
            show_default=False,
            help="The VAE, which is copied: sd-vae-ft-ema's folder, or its safetensors in ldm names; a .pt has none",
        ),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="Number format of the network's weights; none: the file's own", show_default=False),
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads, for a width that is not the authors'")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="FOLDER may be a card without weights; its facts are kept")
    ] = False,
    models: Folder = None,
) -> None:
    """Convert a DiT's torch files to a model: a card and safetensors in diffusers' names."""
    import torch

    from app.checkpoints.convert import Conversion, convert_dit

    shipped = [read_settings(models=models).models / card for card in LABELLED]
    indices = [place / INDEX for place in (*[file] * file.is_dir(), *[folder] * replace, *shipped)]
    labels = next((names for one in indices if one.is_file() and (names := read_labels(one))), ())
    wanted = Conversion(file, folder, vae, dtype and getattr(torch, dtype), heads, labels, replace)
    convert_dit(wanted, typer.echo)
    typer.echo(f"next: instep serve --models {folder.parent}")
