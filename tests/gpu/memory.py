"""What a process holds of a device's memory, and a device without room for a wide forward."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import pytest
import torch

from app.families.base import Conditions, Family


def held(device: str) -> int:
    """Bytes: of a GPU what torch has given out and not got back, of a CPU all that the process has."""
    gc.collect()
    if device != "cpu":
        torch.cuda.synchronize(device)
        return torch.cuda.memory_allocated(device)
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def narrow(family: Family, widest: int, patch: pytest.MonkeyPatch) -> list[int]:
    """Let forwards of more passes than `widest` fail for want of memory; the widths that did are noted.

    On a GPU the allocator itself refuses, because what it is asked for is more than the device has; a CPU would page.
    """
    plain, refused = family.denoise, []

    def denoise(x: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> tuple[torch.Tensor, torch.Tensor | None]:
        if len(x) > widest:
            refused.append(len(x))
            if family.device.type != "cuda":
                raise torch.OutOfMemoryError("no room")
            total = torch.cuda.get_device_properties(family.device).total_memory
            torch.empty(2 * total, dtype=torch.uint8, device=family.device)
        return plain(x, t, conditions)

    patch.setattr(family, "denoise", denoise)
    return refused
