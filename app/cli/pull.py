"""`instep models pull`: the files that cards name on the Hub, into the local Hub cache, for servers that ask nobody.

NOTE: hub.py and needs.py are imported late: the Hub library takes a third of a second.
"""

from __future__ import annotations

import shlex
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.filesize import decimal
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TimeRemainingColumn, TransferSpeedColumn

from app.cards.card import Card
from app.cards.catalog import Registry
from app.cli.bodies import open_registry
from app.cli.serve import Folder, read_settings
from app.errors import CheckpointError, LoadError
from app.settings import Settings

if TYPE_CHECKING:
    from app.checkpoints.hub import Repo
    from app.checkpoints.needs import Needs


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
    chosen = _choose(ids or (), everything, registry, settings)
    from app.checkpoints.hub import bytes_left, cache
    from app.checkpoints.needs import needs

    found: list[Needs] = []
    failed = []
    opened: dict[str, Repo] = {}
    for card in chosen:
        try:
            found.append(needs(card, registry.cards, opened))
        except CheckpointError as error:
            failed.append(f"{card.id}: {error.message}")
    left = bytes_left(chain.from_iterable(one.files.values() for one in found))
    if left > (free := _free_bytes()):
        where = f"{cache()} (HF_HOME may name a larger disk)"
        raise LoadError(f"no room: {decimal(left)} to come, {decimal(free)} free in {where}")
    for one in found:
        try:
            _download(one, settings.models)
        except CheckpointError as error:
            failed.append(f"{one.card.id}: {error.message}")
    if failed:
        many = f"{len(failed)} of {len(chosen)} models were not pulled: " if len(chosen) > 1 else ""
        raise LoadError(many + "; ".join(failed))


def _choose(ids: Sequence[str], everything: bool, registry: Registry, settings: Settings) -> list[Card]:
    """The cards to pull, each once. Raises ModelNotFound; LoadError when nothing says which."""
    on_hub = [card for card in registry.cards.values() if card.source.repo]
    if everything:
        return on_hub
    named = list(ids)
    if not named:
        words = (word.strip() for word in (*settings.preload.split(","), settings.default_model))
        named = [word for word in words if word not in ("", "all")]  # to the server, all are those that are here
    if not named:
        known = ", ".join(card.id for card in on_hub) or "none"
        raise LoadError(f"which models? Name them, or set INSTEP_PRELOAD, or --all. On the Hub: {known}")
    return list({card.id: card for card in map(registry.find, named)}.values())


def _free_bytes() -> int:
    """Free bytes of the disk that the cache is on, or will be."""
    from app.checkpoints.hub import cache

    there = next(one for one in (cache(), *cache().absolute().parents) if one.exists())
    return shutil.disk_usage(there).free


def _download(one: Needs, models: Path) -> None:
    """Download what is still to come. models: the folder of cards. Raises CheckpointError."""
    from app.checkpoints.hub import bytes_left, cache, fetch, link

    name, repos = one.card.id, one.files.values()
    if not repos:
        typer.echo(f"{name}: beside its card, nothing to pull")
        return
    count = sum(len(paths) for _, paths in repos)
    left, free = decimal(bytes_left(repos)), decimal(_free_bytes())
    typer.echo(f"{name}: {decimal(one.size)} in {count} files, {left} to come; {free} free in {cache()}")
    for repo, paths in repos:
        with _progress(bytes_left([(repo, paths)])) as show:
            for path in sorted(paths, key=lambda path: (repo.files[path].size, path)):
                fetch(repo, path, show(path, repo.files[path].size, bytes_left([(repo, [path])])))
        link(repo, paths)
    for repo, _ in repos:
        typer.echo(f"{name}: here, {repo.name} at {repo.commit}")
        if repo.name == one.card.source.repo and repo.revision != repo.commit:
            typer.echo(f'{name}: not pinned; to stay with these files: source.revision = "{repo.commit}" in its card')
    if torch := one.torch_repo:
        words = shlex.join(["instep", "models", "convert", str(torch.snapshot), str(models / name), "--replace"])
        typer.echo(f"{name}: its weights are torch files, which a server does not load; next: {words}")


@contextmanager
def _progress(left: int) -> Iterator[Callable[[str, int, int], Callable[[int], None]]]:
    """Show what comes: one bar in a terminal, elsewhere a line for each file that has to come.

    Yields a function of a file's path, its bytes and those that are left; it returns what `fetch` calls.
    """
    console = Console()
    columns = (BarColumn(24), DownloadColumn(), TransferSpeedColumn(), TimeRemainingColumn())
    text = TextColumn("{task.description}")
    with Progress(*columns, text, console=console, disable=not console.is_terminal, transient=True) as bars:
        task = bars.add_task("", total=left)

        def show(path: str, size: int, more: int) -> Callable[[int], None]:
            bars.update(task, description=path)
            if not console.is_terminal and more:
                typer.echo(f"  {path}: {decimal(size)}")
            return lambda count: bars.advance(task, count)

        yield show
