"""`instep models pull`: the files that cards name on the Hub, into the local Hub cache, for servers that ask nobody.

Knows nothing of servers or devices, nor of what a card needs (needs.py) and how files come (download.py).

NOTE: hub.py and download.py are imported late: the Hub library takes a third of a second, and this command alone needs
it.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from app.cards.card import Card
from app.cards.catalog import Registry
from app.checkpoints.needs import Plan, plan
from app.cli.bodies import open_registry
from app.cli.serve import Folder, read_settings
from app.errors import CheckpointError, LoadError
from app.settings import Settings

if TYPE_CHECKING:
    from app.checkpoints.hub import Repo


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
            carry_out(one, settings.models)
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


def check_room(plans: Iterable[Plan]) -> None:
    """Raises LoadError when the disk of the cache has less room than is to come, with both numbers."""
    from app.checkpoints.hub import cache

    pieces: dict[str, tuple[Repo, set[str]]] = {}
    for repo, paths in (piece for one in plans for piece in one.pieces.values()):
        pieces.setdefault(str(repo.folder), (repo, set()))[1].update(paths)
    left = sum(repo.left(paths) for repo, paths in pieces.values())
    if left > (free := free_bytes(cache())):
        where = f"{cache()} (HF_HOME may name a larger disk)"
        raise LoadError(f"no room: {decimal(left)} to come, {decimal(free)} free in {where}")


def free_bytes(folder: Path) -> int:
    """Free bytes of the disk that a folder is on, or will be."""
    there = next(one for one in (folder, *folder.absolute().parents) if one.exists())
    return shutil.disk_usage(there).free


def carry_out(one: Plan, models: Path) -> None:
    """Download what is still to come. models: the folder of cards. Raises CheckpointError."""
    from app.checkpoints.download import fetch, link
    from app.checkpoints.hub import cache

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
    if torch_files := one.pickled:
        words = shlex.join(["instep", "models", "convert", str(torch_files.snapshot), str(models / name), "--replace"])
        typer.echo(f"{name}: its weights are torch files, which a server does not load; next: {words}")


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
