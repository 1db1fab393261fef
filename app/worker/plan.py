"""Plan: what the settings ask for: which devices get an engine process, its threads, which models load at start."""

import contextlib
import math
import os
import re
from collections.abc import Sequence
from importlib import metadata
from itertools import takewhile
from pathlib import Path

from app.cards.card import Card
from app.cards.cards import Cards
from app.cards.folder import ModelFolder
from app.errors import SettingsError
from app.settings import Settings

_DEVICE = re.compile(r"cpu|cuda(:[0-9]+)?")
_CGROUPS = Path("/sys/fs/cgroup")
_MINE = Path("/proc/self/cgroup")


def devices(text: str, dev: Path = Path("/dev")) -> list[str]:
    """One entry for each engine process: "cpu,cpu" gives two; "auto" gives every GPU, or one "cpu" without any.

    Raises SettingsError on an entry that is no device.
    """
    entries = [entry.strip() for entry in text.split(",") if entry.strip()]
    if entries == ["auto"]:
        return [f"cuda:{index}" for index in range(count_gpus(dev))] or ["cpu"]
    for entry in entries:
        if not _DEVICE.fullmatch(entry):
            raise SettingsError(f'INSTEP_DEVICES: "{entry}" is not "cpu", "cuda:N" or "auto"', param="devices")
    if not entries:
        raise SettingsError('INSTEP_DEVICES is empty; "auto" picks what is there', param="devices")
    return entries


def named(devices: Sequence[str]) -> list[tuple[str, str]]:
    """(name, device) of each engine process: "cpu" alone is called so, of two the second is "cpu#1"."""
    earlier = [devices[:index].count(device) for index, device in enumerate(devices)]
    return [(f"{device}#{count}" if count else device, device) for device, count in zip(devices, earlier, strict=True)]


def count_gpus(dev: Path = Path("/dev")) -> int:
    """How many GPUs torch will see: the files /dev/nvidia0, 1, ..., narrowed by CUDA_VISIBLE_DEVICES.

    0 when the installed torch is a CPU build, by its version: the front process never imports torch.
    """
    if metadata.version("torch").endswith("+cpu"):
        return 0
    files = sum(1 for file in dev.glob("nvidia*") if re.fullmatch("nvidia[0-9]+", file.name))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return files
    # NOTE: CUDA reads the list up to its first invalid entry; "-1" or nothing hides the rest.
    entries = (entry.strip() for entry in visible.split(","))
    return min(files, len(list(takewhile(lambda entry: entry and not entry.startswith("-"), entries))))


def preloads(settings: Settings, cards: dict[str, Card]) -> list[str]:
    """Ids of the models that load at start: `all` is all that are on this machine, a name is taken at its word.

    Raises SettingsError on a name that no card has.
    """
    if settings.preload.strip() == "all":
        return [name for name, card in cards.items() if not card.base and ModelFolder(card, cards).here()]
    wanted, owners = [entry.strip() for entry in settings.preload.split(",") if entry.strip()], Cards(cards).owners
    for name in wanted:
        if name not in owners:
            why = Cards(cards).reason(name)
            raise SettingsError(f'INSTEP_PRELOAD: no card is named "{name}"{why}', param="preload")
    return list(dict.fromkeys(owners[name].model for name in wanted))


def threads(settings: Settings, root: Path = _CGROUPS, mine: Path = _MINE) -> int:
    """CPU threads for one engine process: as set, or its part of the cores that we may use."""
    return settings.threads or max(1, cores(root, mine) // len(devices(settings.devices)))


def cores(root: Path = _CGROUPS, mine: Path = _MINE) -> int:
    """Cores that we may use: those we are bound to, or as many as our quota of time is worth, rounded up.

    root: where control groups (version 2) are mounted. mine: which of them is ours. In a container the path may be the
    host's; there the container's own group is mounted as the root.
    NOTE: more threads than that wait for each other while the quota holds them back.
    """
    found = [len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1]
    group = root / mine.read_text().rpartition("::")[2].strip().lstrip("/") if mine.exists() else root
    for folder in (group, *group.parents[: len(group.relative_to(root).parts)]):
        with contextlib.suppress(OSError, ValueError):  # no quota here, or "max"
            quota, period = map(int, (folder / "cpu.max").read_text(encoding="ascii").split())
            found.append(math.ceil(quota / period))
    return min(found)
