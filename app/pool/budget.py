"""Budget: how many bytes something may take, as the settings say it: "40GB", "512MiB", or a share, "80%".

Knows nothing of models or of what is loaded.
"""

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
    """Bytes that `text` means where `total` are there; None: no share. name: the setting's. Raises SettingsError."""
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
    """Bytes of memory that this machine, or the container that we are in, has in all."""
    physical = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    try:
        return min(physical, int(cgroup.read_text(encoding="ascii")))
    except (OSError, ValueError):  # no cgroup, or "max"
        return physical


def budgets(settings: Settings, device: str, devices: Sequence[str]) -> tuple[int, int]:
    """Bytes that weights may take of this device, and of host memory beside it.

    devices: of every engine process; they share the host's memory, and a device that is named twice. Raises
    SettingsError.
    """
    total = host = host_bytes() // len(devices)
    if device.startswith("cuda"):
        sharers = sum(_index(one) == _index(device) for one in devices if one.startswith("cuda"))
        total = torch.cuda.get_device_properties(device).total_memory // sharers
    return (
        parse_bytes(settings.device_memory, total, "device_memory"),
        parse_bytes(settings.host_memory, host, "host_memory"),
    )


def _index(device: str) -> int:
    """Which GPU: "cuda" is the first."""
    return torch.device(device).index or 0


def text_bytes(settings: Settings) -> int:
    """Bytes that encoded prompts may take of a device. Raises SettingsError."""
    return parse_bytes(settings.text_cache, None, "text_cache")


def readable(count: int) -> str:
    """Bytes in words: "1.50 GB"."""
    size, unit = float(count), "B"
    for larger in ("kB", "MB", "GB"):
        if size < 1000:
            break
        size, unit = size / 1000, larger
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.2f} {unit}"
