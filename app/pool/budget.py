"""Budget: how many bytes of a device, and of the memory of the machine, a part of the process may take."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import torch

from app.errors import SettingsError
from app.settings import Settings

_AMOUNT = re.compile(r"\s*([0-9]+(?:\.[0-9]+)?)\s*(%|[kmgt]?i?b?)\s*", re.IGNORECASE)
_CGROUP = Path("/sys/fs/cgroup/memory.max")


def parse_bytes(text: str, total: int | None, name: str) -> int:
    """Bytes of a setting: "40GB", "512MiB", or a share of `total`, "80%", unless that is None. Raises SettingsError."""
    found = _AMOUNT.fullmatch(text)
    number, unit = (float(found[1]), found[2].lower()) if found else (0.0, "")
    if not found or (unit == "%" and total is None):
        forms = 'is not bytes ("256MB")' if total is None else 'is neither bytes ("40GB") nor a share ("80%")'
        raise SettingsError(f'INSTEP_{name.upper()}: "{text}" {forms}', param=name)
    if unit == "%" and total is not None:
        if number > 100:
            raise SettingsError(f"INSTEP_{name.upper()}: {text} is over 100 %", param=name)
        return int(total * number / 100)
    power = " kmgt".index(unit[0]) if unit and unit[0] != "b" else 0
    return int(number * (1024 if "i" in unit else 1000) ** power)


def host_bytes(cgroup: Path = _CGROUP) -> int:
    """All bytes of memory of this machine, or of the container that we are in."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int(cgroup.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no cgroup, or "max"
        return physical


def budgets(settings: Settings, device: str, devices: Sequence[str]) -> tuple[int, int]:
    """Bytes that weights may take of this device, and of host memory besides. Raises SettingsError.

    devices: of every engine process; they share the host's memory, and a device that is named twice.
    """
    total = host = host_bytes() // len(devices)
    if device.startswith("cuda"):
        own, *others = (torch.device(one).index or 0 for one in (device, *devices) if one.startswith("cuda"))
        sharers = others.count(own)
        total = torch.cuda.get_device_properties(device).total_memory // sharers
    return (
        parse_bytes(settings.device_memory, total, "device_memory"),
        parse_bytes(settings.host_memory, host, "host_memory"),
    )
