"""`instep models pull`: the files that cards name on the Hub, into the local Hub cache, for servers that ask nobody.

Knows nothing of servers or devices, and of the Hub only what it holds (hub.py) and how files come (download.py).
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from app.api.registry import Registry
from app.card import INDEX, Card
from app.cli.bodies import open_registry
from app.cli.models import Folder
from app.cli.serve import read_settings
from app.errors import CheckpointError, LoadError
from app.settings import Settings

if TYPE_CHECKING:
    from app.cli.hub import Repo

# NOTE: hub.py and download.py are imported late: the Hub library takes a third of a second, and this command alone
# needs it.

_STEMS = ("diffusion_pytorch_model", "model")
_SETTINGS = re.compile(r"(?!.*\.index\.)[^/]+\.(json|txt)")
_OTHERS = re.compile(r"[^/]+\.(bin|pt|pth|ckpt|msgpack|h5|onnx)")
_PART = re.compile(r"[a-z][a-z0-9_]{0,63}")
INDEX_LIMIT = 2**20


@dataclass
class Plan:
    """What a card needs: of each repository, these files."""

    card: Card
    pieces: dict[str, tuple[Repo, list[str]]] = field(default_factory=dict)

    @property
    def left(self) -> int:
        """Bytes that are still to come."""
        return sum(repo.left(paths) for repo, paths in self.pieces.values())

    @property
    def size(self) -> int:
        return sum(repo.files[path].size for repo, paths in self.pieces.values() for path in paths)


def pull(
    ids: Annotated[
        list[str] | None, typer.Argument(help="Model ids or aliases; none: those the server preloads")
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Every card whose files are on the Hub")] = False,
    models: Folder = None,
) -> None:
    """Download what models need from the Hub: only that, resumed where it broke off, checked. Needs HF_TOKEN if gated.

    Without ids: the models that INSTEP_PRELOAD and INSTEP_DEFAULT_MODEL name.
    """
    settings = read_settings(models=models)
    registry = open_registry(settings)
    chosen = choose(ids or (), everything, registry, settings)
    plans, failed = [], []
    opened: dict[str, Repo] = {}
    for card in chosen:
        try:
            plans.append(plan(card, registry.cards, opened))
        except CheckpointError as error:
            failed.append(f"{card.id}: {error.message}")
    check_room(plans)
    for one in plans:
        try:
            carry_out(one)
        except CheckpointError as error:
            failed.append(f"{one.card.id}: {error.message}")
    if failed:
        many = f"{len(failed)} of {len(chosen)} models were not pulled: " if len(chosen) > 1 else ""
        raise LoadError(many + "; ".join(failed))


def choose(ids: Sequence[str], everything: bool, registry: Registry, settings: Settings) -> list[Card]:
    """The cards to pull, each once. Raises ModelNotFound; LoadError when nothing says which."""
    named = list(ids)
    if not named and not everything:
        named = [word.strip() for word in (*settings.preload.split(","), settings.default_model)]
        named = [word for word in named if word not in ("", "all")]  # to the server, all are those that are here
    if everything:
        return [card for card in registry.cards.values() if card.source.repo]
    if not named:
        known = ", ".join(card.id for card in registry.cards.values() if card.source.repo) or "none"
        raise LoadError(f"which models? Name them, or set INSTEP_PRELOAD, or --all. On the Hub: {known}")
    return list({card.id: card for card in map(registry.find, named)}.values())


def plan(card: Card, cards: Mapping[str, Card], opened: dict[str, Repo]) -> Plan:
    """What this card needs: its own parts, and those that it takes from others. Raises CheckpointError.

    opened: repositories that were asked for already; grows.
    """
    made = Plan(card)
    if card.source.repo:
        repo, index = _open(card, opened)
        own = {part for part, entry in index.items() if isinstance(entry, list) and entry not in (None, [None, None])}
        _add(made, repo, own - set(card.components), bare=set(card.files))
    for target in card.components.values():
        owner, _, folder = target.partition("/")
        if cards[owner].source.repo:
            repo, index = _open(cards[owner], opened)
            _add(made, repo, {folder}, bare={folder} & set(cards[owner].files))
    return made


def wanted(files: Iterable[str], parts: Iterable[str], bare: Iterable[str] = ()) -> list[str]:
    """Of a repository's files, those that a server reads for these parts (folders): settings, tokenizers, weights.

    bare: parts whose weights are elsewhere. Raises CheckpointError for a part without safetensors.
    """
    listed = list(files)
    found: list[str] = []
    for part in parts:
        names = {path.removeprefix(f"{part}/") for path in listed if path.startswith(f"{part}/")}
        mine = [name for name in names if _SETTINGS.fullmatch(name)]
        if part not in bare:
            mine += _weights(part, names)
        found += [f"{part}/{name}" for name in mine]
    return sorted(found)


def _weights(part: str, names: set[str]) -> list[str]:
    """One format of a part's weights, without variants; the order is that in which app/pool/weights.py looks."""
    for stem in _STEMS:
        index = f"{stem}.safetensors.index.json"
        if index in names:
            shard = re.compile(rf"{stem}-\d+-of-\d+\.safetensors")
            return [index, *(name for name in names if shard.fullmatch(name))]
        if f"{stem}.safetensors" in names:
            return [f"{stem}.safetensors"]
    others = sorted(name for name in names if _OTHERS.fullmatch(name))
    if others:
        raise CheckpointError(f"{part} has no safetensors there, only {others[0]}, which this server does not load")
    return []


def check_room(plans: Iterable[Plan]) -> None:
    """Raises LoadError when the disk of the cache has less room than is to come, with both numbers."""
    from app.cli.hub import cache

    pieces: dict[str, tuple[Repo, set[str]]] = {}
    for repo, paths in (piece for one in plans for piece in one.pieces.values()):
        pieces.setdefault(str(repo.folder), (repo, set()))[1].update(paths)
    left = sum(repo.left(paths) for repo, paths in pieces.values())
    if left > (free := free_bytes(cache())):
        raise LoadError(f"no room: {decimal(left)} to come, {decimal(free)} free in {cache()} (HF_HOME is elsewhere)")


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that a folder is on, or will be."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    return shutil.disk_usage(there).free


def carry_out(one: Plan) -> None:
    """Download what is still to come. Raises CheckpointError."""
    from app.cli.download import fetch, link
    from app.cli.hub import cache

    name, card = one.card.id, one.card
    if not one.pieces:
        typer.echo(f"{name}: beside its card, nothing to pull")
        return
    count = sum(len(paths) for _, paths in one.pieces.values())
    left, free = one.left, decimal(free_bytes(cache()))
    typer.echo(f"{name}: {decimal(one.size)} in {count} files, {decimal(left)} to come; {free} free in {cache()}")
    for repo, paths in one.pieces.values():
        with _progress(repo.left(paths)) as show:
            for path in sorted(paths, key=lambda path: repo.files[path].size):
                fetch(repo, path, show(repo, path))
        link(repo, paths)
    for repo, _ in one.pieces.values():
        typer.echo(f"{name}: here, {repo.name} at {repo.commit}")
        if repo.name == card.source.repo and repo.revision != repo.commit:
            typer.echo(f'{name}: not pinned; to stay with these files: source.revision = "{repo.commit}" in its card')


@contextmanager
def _progress(left: int) -> Iterator[Callable[[Repo, str], Callable[[int], None]]]:
    """Gives `fetch` somebody to tell: one bar in a terminal, elsewhere a line for each file that has to come."""
    console = Console()
    columns = (
        BarColumn(24),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.description}"),
    )
    with Progress(*columns, console=console, disable=not console.is_terminal, transient=True) as bars:
        task = bars.add_task("", total=left)

        def show(repo: Repo, path: str) -> Callable[[int], None]:
            bars.update(task, description=path)
            if not console.is_terminal and repo.left([path]):
                typer.echo(f"  {path}: {decimal(repo.files[path].size)}")
            return lambda count: bars.advance(task, count)

        yield show


def _open(card: Card, opened: dict[str, Repo]) -> tuple[Repo, dict[str, object]]:
    """The repository of a card and what its model_index.json says."""
    from app.cli.download import fetch
    from app.cli.hub import open_repo

    name, revision = str(card.source.repo), card.source.revision
    key = f"{name}@{revision}"
    if key not in opened:
        opened[key] = open_repo(name, revision)
    repo = opened[key]
    if INDEX not in repo.files or repo.files[INDEX].size > INDEX_LIMIT:
        raise CheckpointError(f"{name} has no {INDEX}, or too large a one: it is not in the diffusers layout")
    try:
        index = json.loads(fetch(repo, INDEX).read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{name}: {INDEX}: {error}") from error
    if not isinstance(index, dict):
        raise CheckpointError(f"{name}: {INDEX} is not a table")
    return repo, index


def _add(made: Plan, repo: Repo, parts: set[str], bare: set[str]) -> None:
    for part in parts:
        if not _PART.fullmatch(part):
            raise CheckpointError(f'{repo.name}: {INDEX}: "{part}" is not the name of a part')
    try:
        paths = wanted(repo.files, parts, bare)
    except CheckpointError as error:
        raise CheckpointError(f"{repo.name}: {error.message}") from error
    key = f"{repo.name}@{repo.commit}"
    before = made.pieces.get(key, (repo, []))[1]
    made.pieces[key] = repo, sorted({INDEX, *before, *paths})
