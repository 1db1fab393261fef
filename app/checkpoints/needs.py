"""The files of Hub repositories that a card needs, and no more."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from app.cards.card import Card
from app.cards.files import INDEX, STEMS, read_classes
from app.checkpoints.hub import Repo, fetch, open_repo
from app.errors import CheckpointError

INDEX_LIMIT = 2**20

_BIN = "diffusion_pytorch_model.bin"
_SETTINGS = re.compile(r"(?!.*\.index\.)[^/]+\.(json|txt)")
_OTHERS = re.compile(r"[^/]+\.(bin|pt|pth|ckpt|msgpack|h5|onnx)")
_PART = re.compile(r"[a-z][a-z0-9_]{0,63}")


@dataclass
class Needs:
    """What a card needs: of each repository, by name and commit, these files."""

    card: Card
    files: dict[str, tuple[Repo, set[str]]] = field(default_factory=dict)

    @property
    def torch_repo(self) -> Repo | None:
        """The repository whose weights are torch files, to be converted once they are here."""
        return next((repo for repo, paths in self.files.values() if any(path.endswith(_BIN) for path in paths)), None)

    @property
    def size(self) -> int:
        """Bytes of all files."""
        return sum(repo.files[path].size for repo, paths in self.files.values() for path in paths)


def needs(card: Card, cards: Mapping[str, Card], opened: dict[str, Repo]) -> Needs:
    """The files of a card's own parts, and of those that it takes from other cards. Raises CheckpointError.

    opened: repositories that were asked for already; grows.
    """
    found = Needs(card)
    if card.source.repo:
        repo = _open(card, opened)
        parts = _parts_of(repo) - set(card.components) | {"scheduler"}
        _add(found, repo, parts, set(card.files), card.facts.torch_files)
    for target in card.components.values():
        owner, _, folder = target.partition("/")
        if cards[owner].source.repo:
            repo = _open(cards[owner], opened)
            _parts_of(repo)
            _add(found, repo, {folder}, {folder} & set(cards[owner].files))
    return found


def _open(card: Card, opened: dict[str, Repo]) -> Repo:
    name, revision = str(card.source.repo), card.source.revision
    key = f"{name}@{revision}"
    if key not in opened:
        opened[key] = open_repo(name, revision)
    return opened[key]


def _parts_of(repo: Repo) -> set[str]:
    """The parts that its model_index.json names."""
    if INDEX not in repo.files or repo.files[INDEX].size > INDEX_LIMIT:
        raise CheckpointError(f"{repo.name} has no {INDEX}, or too large a one: it is not in the diffusers layout")
    file = fetch(repo, INDEX)
    try:
        return set(read_classes(file))
    except CheckpointError as error:
        raise CheckpointError(f"{repo.name}: {error.message.replace(str(file), INDEX)}") from error


def _add(found: Needs, repo: Repo, parts: set[str], bare: set[str], torch: bool = False) -> None:
    for part in parts:
        if not _PART.fullmatch(part):
            raise CheckpointError(f'{repo.name}: {INDEX}: "{part}" is not the name of a part')
    try:
        paths = wanted(repo.files, parts, bare, torch)
    except CheckpointError as error:
        raise CheckpointError(f"{repo.name}: {error.message}") from error
    found.files.setdefault(f"{repo.name}@{repo.commit}", (repo, {INDEX}))[1].update(paths)


def wanted(files: Iterable[str], parts: Iterable[str], bare: Iterable[str] = (), torch: bool = False) -> list[str]:
    """Of a repository's files, those that a server reads for these parts (folders): settings, tokenizers, weights.

    bare: parts whose weights are elsewhere. torch: whether diffusers' torch files will do, which `instep models
    convert` reads, for parts without safetensors; else raises CheckpointError for those.
    """
    listed = list(files)
    found: list[str] = []
    for part in parts:
        names = {path.removeprefix(f"{part}/") for path in listed if path.startswith(f"{part}/")}
        mine = [name for name in names if _SETTINGS.fullmatch(name)]
        if part not in bare:
            mine += _weights(part, names, torch)
        found += [f"{part}/{name}" for name in mine]
    return sorted(found)


def _weights(part: str, names: set[str], torch: bool) -> list[str]:
    """One format of a part's weights, without variants; the order is that in which app/cards/files.py looks."""
    for stem in STEMS:
        index = f"{stem}.safetensors.index.json"
        if index in names:
            shard = re.compile(rf"{stem}-\d+-of-\d+\.safetensors")
            return [index, *(name for name in names if shard.fullmatch(name))]
        if f"{stem}.safetensors" in names:
            return [f"{stem}.safetensors"]
    if torch and _BIN in names:
        return [_BIN]
    others = sorted(name for name in names if _OTHERS.fullmatch(name))
    if others:
        raise CheckpointError(f"{part} has no safetensors there, only {others[0]}, which this server does not load")
    return []
