"""Plan: what the settings ask for, spelled out: which devices get an engine process, which models load at start.

Knows nothing of torch: GPUs are counted by their device files, because the front process must stay light.
"""

from __future__ import annotations

import math
import os
import re
from collections import Counter
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path

from app.card import Card
from app.cards.cards import Cards
from app.cards.folder import ModelFolder
from app.errors import SettingsError
from app.settings import Settings

_DEVICE = re.compile(r"cpu|cuda(:[0-9]+)?")
_CGROUP = Path("/sys/fs/cgroup/cpu.max")


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
    seen: Counter[str] = Counter()
    names = []
    for device in devices:
        names.append((f"{device}#{seen[device]}" if seen[device] else device, device))
        seen[device] += 1
    return names


def count_gpus(dev: Path = Path("/dev")) -> int:
    """How many GPUs torch will see: the files /dev/nvidia0, 1, ..., narrowed by CUDA_VISIBLE_DEVICES.

    0 when the installed torch is a CPU build, by its version, which is read without importing it.
    """
    if _torch_version().endswith("+cpu"):
        return 0
    files = sum(1 for file in dev.glob("nvidia*") if re.fullmatch("nvidia[0-9]+", file.name))
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return files
    count = 0
    for entry in visible.split(","):
        # NOTE: CUDA reads the list up to its first invalid entry; "-1" or nothing hides the rest.
        if not entry.strip() or entry.strip().startswith("-"):
            break
        count += 1
    return min(files, count)


def preloads(settings: Settings, cards: dict[str, Card]) -> list[str]:
    """Ids of the models that load at start: `all` is all that are on this machine, a name is taken at its word.

    Raises SettingsError on a name that no card has.
    """
    if settings.preload.strip() == "all":
        return [name for name, card in cards.items() if ModelFolder(card, cards).here()]
    names = {name: card.id for card in cards.values() for name in (card.id, *card.aliases)}
    wanted = dict.fromkeys(entry.strip() for entry in settings.preload.split(",") if entry.strip())
    for name in wanted:
        if name not in names:
            why = Cards(cards).reason(name)
            raise SettingsError(f'INSTEP_PRELOAD: no card is named "{name}"{why}', param="preload")
    return list(dict.fromkeys(names[name] for name in wanted))


def threads(settings: Settings, cgroup: Path = _CGROUP) -> int:
    """CPU threads for one engine process: as set, or the cores that we may use shared by the processes."""
    return settings.threads or max(1, cores(cgroup) // len(devices(settings.devices)))


def cores(cgroup: Path = _CGROUP) -> int:
    """Cores that we may use: those we are bound to, or as many as the container's quota of time is worth, rounded up.

    NOTE: more threads than that wait for each other while the quota holds them back.
    """
    bound = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    try:
        quota, period = cgroup.read_text(encoding="ascii").split()
        return min(bound, max(1, math.ceil(int(quota) / int(period))))
    except (OSError, ValueError):  # no cgroup, or "max"
        return bound


def _torch_version() -> str:
    try:
        return metadata.version("torch")
    except metadata.PackageNotFoundError:
        return "none+cpu"
