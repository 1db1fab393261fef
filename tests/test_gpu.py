"""GPU figures from a driver that is played: no machine of the suite has a GPU.

Only the module `pynvml` is played here, by its own names and error class. That no GPU is no figures is asked of the
real one.
"""

from __future__ import annotations

import threading
from types import SimpleNamespace

import pynvml
import pytest

from app import gpu
from app.gpu import EVERY, READINGS, STALE, Gpus


class Driver:
    """Two GPUs; `broken` names calls that fail, `hang` holds every reading until it is set."""

    NVMLError = pynvml.NVMLError
    NVML_TEMPERATURE_GPU = pynvml.NVML_TEMPERATURE_GPU

    def __init__(self) -> None:
        self.broken: set[str] = set()
        self.hang = threading.Event()
        self.hang.set()
        self.opened = self.readings = 0

    def _say(self, call: str) -> None:
        if call in self.broken:
            raise pynvml.NVMLError(pynvml.NVML_ERROR_NOT_SUPPORTED)

    def nvmlInit(self) -> None:
        self._say("init")
        self.opened += 1

    def nvmlDeviceGetCount(self) -> int:
        self.hang.wait(10)
        self.readings += 1
        self._say("count")
        return 2

    def nvmlDeviceGetHandleByIndex(self, index: int) -> int:
        return index

    def nvmlDeviceGetHandleByUUID(self, uuid: str) -> int:
        return {"GPU-aa": 0, "GPU-bb": 1}[uuid]

    def nvmlDeviceGetUtilizationRates(self, index: int) -> SimpleNamespace:
        self._say("utilization")
        return SimpleNamespace(gpu=90 + index, memory=1)

    def nvmlDeviceGetMemoryInfo(self, index: int) -> SimpleNamespace:
        return SimpleNamespace(used=(index + 1) << 30, total=80 << 30)

    def nvmlDeviceGetTemperature(self, index: int, sensor: int) -> int:
        return 60 + index

    def nvmlDeviceGetPowerUsage(self, index: int) -> int:
        return 650_000 + index


@pytest.fixture
def driver(monkeypatch: pytest.MonkeyPatch) -> Driver:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(gpu, "PATIENCE", 5.0)
    played = Driver()
    monkeypatch.setattr(gpu, "pynvml", played)
    return played


def test_every_figure_in_its_unit(driver: Driver) -> None:
    assert Gpus().figures() == {
        "cuda:0": {
            "gpu_utilization_ratio": 0.9,
            "gpu_memory_used_bytes": 1 << 30,
            "gpu_memory_total_bytes": 80 << 30,
            "gpu_temperature_celsius": 60,
            "gpu_power_watts": 650,
        },
        "cuda:1": {
            "gpu_utilization_ratio": 0.91,
            "gpu_memory_used_bytes": 2 << 30,
            "gpu_memory_total_bytes": 80 << 30,
            "gpu_temperature_celsius": 61,
            "gpu_power_watts": 650.001,
        },
    }


@pytest.mark.parametrize(
    ("visible", "temperatures"),
    [("1", [61]), ("1,0", [61, 60]), ("GPU-bb", [61]), ("0,-1,1", [60]), ("", []), ("-1", [])],
)
def test_devices_are_named_as_torch_names_them(
    driver: Driver, monkeypatch: pytest.MonkeyPatch, visible: str, temperatures: list[int]
) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    figures = Gpus().figures()
    assert list(figures) == [f"cuda:{i}" for i in range(len(temperatures))]
    assert [one["gpu_temperature_celsius"] for one in figures.values()] == temperatures


def test_they_are_read_again_only_after_a_while(driver: Driver) -> None:
    times = [0.0]
    gpus = Gpus(lambda: times[-1])
    for time in (0.0, 1.0, EVERY - 0.1, EVERY, EVERY + 1, 2 * EVERY):
        times.append(time)
        assert gpus.figures()
    assert (driver.readings, driver.opened) == (3, 1)


def test_what_a_gpu_does_not_tell_is_left_out(driver: Driver) -> None:
    driver.broken = {"utilization"}
    assert [set(READINGS) - set(one) for one in Gpus().figures().values()] == [{"gpu_utilization_ratio"}] * 2


def test_a_driver_that_fails_has_no_figures_until_it_is_back(driver: Driver) -> None:
    times = [0.0]
    gpus = Gpus(lambda: times[-1])
    for time, broken in ((0.0, {"init"}), (10.0, set()), (20.0, {"count"}), (30.0, set())):
        times.append(time)
        driver.broken = broken
        assert bool(gpus.figures()) is not bool(broken)
    assert driver.opened == 2


def test_a_driver_that_hangs_holds_nobody_and_its_figures_fade(driver: Driver, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    gpus = Gpus(lambda: now)
    assert gpus.figures()
    monkeypatch.setattr(gpu, "PATIENCE", 0.01)
    driver.hang.clear()
    try:
        now = EVERY
        assert gpus.figures()
        now = STALE - 1
        assert gpus.figures()
        now = STALE
        assert gpus.figures() == {}
    finally:
        driver.hang.set()


def test_the_real_library_without_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu, "PATIENCE", 5.0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert Gpus().figures() == {}
