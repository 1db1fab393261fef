"""`instep models add | convert | pull`: models made of a user's own files, and files from the Hub."""

from __future__ import annotations

import functools
import shlex
import shutil
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich.filesize import decimal

from app.cards.card import Card
from app.cards.cards import read_cards
from app.cards.catalog import Registry
from app.cards.files import INDEX, read_labels
from app.cards.folder import ModelFolder
from app.cli.options import Folder, open_registry, read_settings, with_flags
from app.errors import CheckpointError, LoadError
from app.settings import Settings

# NOTE: app.checkpoints is imported late: torch and the model libraries take seconds, the Hub library a third of one.
if TYPE_CHECKING:
    from app.checkpoints.hub import Needs

LABELLED = ("dit-xl-2-256", "dit-xl-2-512")
"""Cards whose index names the 1000 classes of ImageNet."""

Dtype = Literal["bfloat16", "float16", "float32"]
Place = Annotated[Path | None, typer.Option(help="Folder or safetensors file of this part")]


@with_flags(dict.fromkeys(("vae", "text_encoder", "text_encoder_2", "text_encoder_3"), Place))
def add(
    path: Annotated[Path, typer.Argument(help="A diffusers folder, or a safetensors file in its authors' layout")],
    like: Annotated[str | None, typer.Option(help="Card whose settings it takes; by default the one that fits")] = None,
    name: Annotated[str | None, typer.Option("--id", help="Its id; by default made from the file's name")] = None,
    tokenizers: Annotated[Path | None, typer.Option(help="Folder with tokenizer, tokenizer_2 ... in it")] = None,
    rest: Annotated[str | None, typer.Option(help="Card that has the parts that are still missing")] = None,
    models: Folder = None,
    **places: Path | None,
) -> None:
    """Make a card for files of yours, which stay where they are. `instep models check PATH` shows what they lack."""
    from app.checkpoints.inventory import identify, new_folder

    settings = read_settings(models=models)
    registry = open_registry(settings)
    path = path.absolute()
    made = identify(path, registry.cards.models).choose(registry.find(like) if like else None)
    for part, place in places.items():
        if place is not None:
            made.take(part, place.absolute())
    if tokenizers is not None:
        made.take_tokenizers(tokenizers.absolute())
    if rest is not None:
        made.take_rest(registry.find(rest))
    made.refuse_gaps()
    folder = new_folder(path, settings.models, registry.cards, name)
    made.write(folder)
    model = folder.name
    typer.echo(f"{model}: {folder / 'card.toml'}, like {made.card.id}; the weights stay where they are")
    for line in (*made.left_out(), *made.own_schedule()):
        typer.echo(line)
    cards = read_cards(settings.models)
    draw = "instep serve" if cards[model].draws_classes else f'instep generate "a red apple" --model {model}'
    typer.echo(f"next: {draw if ModelFolder(cards[model], cards).here() else f'instep models pull {model}'}")


def convert(
    file: Annotated[Path, typer.Argument(help="A .pt of the authors or of their train.py, or a folder of .bin")],
    folder: Annotated[Path, typer.Argument(help="Folder to write, <models>/<id>; see --replace if it exists")],
    vae: Annotated[
        Path | None, typer.Option(help="VAE to copy: folder of sd-vae-ft-ema, or its ldm safetensors")
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Format of the network's weights; by default the file's")] = None,
    heads: Annotated[int | None, typer.Option(min=1, help="Attention heads, if not as the authors' widths")] = None,
    replace: Annotated[bool, typer.Option("--replace", help="FOLDER is a card without weights, which is kept")] = False,
    models: Folder = None,
) -> None:
    """Convert a DiT's torch files to a model: a card, and safetensors with diffusers' names."""
    import torch

    from app.checkpoints.convert import convert_dit

    shipped = [read_settings(models=models).models / card for card in LABELLED]
    indices = [place / INDEX for place in (*[file] * file.is_dir(), *[folder] * replace, *shipped)]
    labels = next((names for one in indices if one.is_file() and (names := read_labels(one))), ())
    own = dtype and getattr(torch, dtype)
    convert_dit(file, folder, vae, typer.echo, dtype=own, heads=heads, labels=labels, replace=replace)
    typer.echo(f"next: instep serve --models {folder.parent}")


def pull(
    ids: Annotated[list[str] | None, typer.Argument(help="Ids or aliases; by default what the server preloads")] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every card whose files are on the Hub")] = False,
    models: Folder = None,
) -> None:
    """Download the files that models need from the Hub, and check them. Gated models need HF_TOKEN.

    Without ids: the models that INSTEP_PRELOAD and INSTEP_DEFAULT_MODEL name.
    """
    settings = read_settings(models=models)
    registry = open_registry(settings)
    chosen = _choose(ids or (), everything, registry, settings)
    from app.checkpoints.hub import bytes_left, cache, needs, open_repo

    found: dict[str, Needs] = {}
    failed: dict[str, str] = {}
    opened = functools.cache(open_repo)
    for card in chosen:
        try:
            found[card.id] = needs(card, registry.cards, opened)
        except CheckpointError as error:
            failed[card.id] = error.message
    left = bytes_left(chain.from_iterable(files.values() for files in found.values()))
    if left > (free := _free_bytes(cache())):
        where = f"{cache()} (HF_HOME may name a larger disk)"
        raise LoadError(f"no room: {decimal(left)} to come, {decimal(free)} free in {where}")
    for model, files in found.items():
        try:
            _download(registry.cards[model], files, settings.models)
        except CheckpointError as error:
            failed[model] = error.message
    if failed:
        many = f"{len(failed)} of {len(chosen)} models were not pulled: " if len(chosen) > 1 else ""
        raise LoadError(many + "; ".join(f"{model}: {reason}" for model, reason in failed.items()))


def _choose(ids: Sequence[str], everything: bool, registry: Registry, settings: Settings) -> list[Card]:
    """The cards to pull, each once. Raises ModelNotFound; LoadError when nothing says which."""
    on_hub = [card for card in registry.cards.models.values() if card.source.repo]
    if everything:
        return on_hub
    # NOTE: to the server, "all" are the models that are here: there is nothing to pull.
    preloaded = (word.strip() for word in (*settings.preload.split(","), settings.default_model))
    named = ids or [word for word in preloaded if word not in ("", "all")]
    if not named:
        known = ", ".join(card.id for card in on_hub) or "none"
        raise LoadError(f"which models? Name them, or set INSTEP_PRELOAD, or --all. On the Hub: {known}")
    return list({card.model: registry.all[card.model] for card in map(registry.find, named)}.values())


def _free_bytes(folder: Path) -> int:
    """Free bytes of the disk that a folder is on, or will be."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    return shutil.disk_usage(there).free


def _download(card: Card, files: Needs, models: Path) -> None:
    """Download what is still to come, small files first, with a line for each.

    models: the folder of cards. Raises CheckpointError.
    """
    from app.checkpoints.hub import bytes_left, cache

    if not files:
        typer.echo(f"{card.id}: beside its card, nothing to pull")
        return
    sizes = [repo.files[path].size for repo, paths in files.values() for path in paths]
    left, free = bytes_left(files.values()), decimal(_free_bytes(cache()))
    summary = f"{decimal(sum(sizes))} in {len(sizes)} files, {decimal(left)} to come"
    typer.echo(f"{card.id}: {summary}; {free} free in {cache()}")
    for repo, paths in files.values():
        for path in sorted(paths, key=lambda path: (repo.files[path].size, path)):
            if size := repo.left(path):
                typer.echo(f"  {path}: {decimal(size)}")
            repo.fetch(path)
        repo.link(paths)
    for repo, _ in files.values():
        typer.echo(f"{card.id}: here, {repo.name} at {repo.commit}")
        if repo.name == card.source.repo and repo.revision != repo.commit:
            pin = f'source.revision = "{repo.commit}" in its card'
            typer.echo(f"{card.id}: not pinned; to stay with these files: {pin}")
    for repo, paths in files.values():
        if any(path.endswith(".bin") for path in paths):
            words = shlex.join(["instep", "models", "convert", str(repo.snapshot), str(models / card.id), "--replace"])
            typer.echo(f"{card.id}: its weights are torch files, which a server does not load; next: {words}")
