"""Figures of the GPUs from their driver: load, memory, temperature, power. None without a GPU or a driver."""

from __future__ import annotations

import math
import os
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import Any

import pynvml  # type: ignore[import-untyped]

Figures = Mapping[str, Mapping[str, float]]
"""Device ("cuda:0", as torch names it) to name to value, in the unit that the name ends with."""

READINGS: Mapping[str, Callable[[Any], float]] = {
    "gpu_utilization_ratio": lambda gpu: pynvml.nvmlDeviceGetUtilizationRates(gpu).gpu / 100,
    "gpu_memory_used_bytes": lambda gpu: pynvml.nvmlDeviceGetMemoryInfo(gpu).used,
    "gpu_memory_total_bytes": lambda gpu: pynvml.nvmlDeviceGetMemoryInfo(gpu).total,
    "gpu_temperature_celsius": lambda gpu: pynvml.nvmlDeviceGetTemperature(gpu, pynvml.NVML_TEMPERATURE_GPU),
    "gpu_power_watts": lambda gpu: pynvml.nvmlDeviceGetPowerUsage(gpu) / 1000,
}

EVERY = 5.0  # seconds between two readings
PATIENCE = 0.01  # seconds that a caller waits for a reading; one that takes longer is shown by the next call
STALE = 60.0  # seconds after which figures are dropped: a driver that hangs must not look like one that is idle


class Gpus:
    """The GPUs of this machine that CUDA_VISIBLE_DEVICES leaves. Reads in a thread of its own, so it never blocks."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._asked = self._answered = -math.inf
        self._figures: Figures = {}
        self._open = False
        self._thread: threading.Thread | None = None

    def figures(self) -> Figures:
        """The last figures, read again when they are EVERY seconds old; empty without a GPU. Never raises."""
        if self._clock() - self._asked >= EVERY and not (self._thread and self._thread.is_alive()):
            self._asked = self._clock()
            self._thread = threading.Thread(target=self._refresh, name="gpu", daemon=True)
            self._thread.start()
            self._thread.join(PATIENCE)
        return self._figures if self._clock() - self._answered < STALE else {}

    def _refresh(self) -> None:
        try:
            if not self._open:
                pynvml.nvmlInit()
                self._open = True
            figures = {device: _read(gpu) for device, gpu in _handles().items()}
        except pynvml.NVMLError:
            self._open, figures = False, {}
        self._figures, self._answered = figures, self._clock()


def _handles() -> dict[str, Any]:
    """The driver's handles by torch's names.

    NOTE: the driver counts by PCI bus. CUDA does so too where all GPUs are alike, or with CUDA_DEVICE_ORDER=PCI_BUS_ID.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    entries = [str(i) for i in range(pynvml.nvmlDeviceGetCount())] if visible is None else visible.split(",")
    handles: dict[str, Any] = {}
    for entry in (entry.strip() for entry in entries):
        if not entry or entry.startswith("-"):
            break
        find = pynvml.nvmlDeviceGetHandleByIndex if entry.isdecimal() else pynvml.nvmlDeviceGetHandleByUUID
        handles[f"cuda:{len(handles)}"] = find(int(entry) if entry.isdecimal() else entry)
    return handles


def _read(gpu: Any) -> dict[str, float]:
    """All figures of this GPU that its driver has; for a slice of one (MIG) some are missing."""
    found = {}
    for name, reading in READINGS.items():
        with suppress(pynvml.NVMLError):
            found[name] = float(reading(gpu))
    return found
