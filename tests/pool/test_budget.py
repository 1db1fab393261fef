"""Budgets: bytes as people write them, and the memory that a container may have."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from app.errors import SettingsError
from app.pool.budget import budgets, host_bytes, parse_bytes
from app.settings import Settings


@pytest.mark.parametrize(
    ("text", "count"),
    [
        ("80%", 800), ("100 %", 1000), ("0.5%", 5), ("123", 123), ("1kB", 1000), ("1 KiB", 1024), ("2.5m", 2_500_000),
        ("40GB", 40 * 10**9), ("24gib", 24 * 2**30), ("1t", 10**12), ("0", 0),
    ],
)  # fmt: skip
def test_bytes_and_shares(text: str, count: int) -> None:
    assert parse_bytes(text, 1000, "device_memory") == count


@pytest.mark.parametrize("text", ["", "lots", "-1", "101%", "1e9", "12 apples", "GB", "1.2.3", "nan", "inf"])
def test_what_is_neither(text: str) -> None:
    with pytest.raises(SettingsError, match="INSTEP_HOST_MEMORY") as caught:
        parse_bytes(text, 1000, "host_memory")
    assert caught.value.param == "host_memory"


@pytest.mark.parametrize("text", ["10%", "100 %", "lots", ""])
def test_encoded_prompts_take_bytes_and_no_share(text: str) -> None:
    assert parse_bytes(Settings().text_cache, None, "text_cache") == 256 * 10**6
    with pytest.raises(SettingsError, match=r"INSTEP_TEXT_CACHE: .* is not bytes") as caught:
        parse_bytes(text, None, "text_cache")
    assert caught.value.param == "text_cache"


def test_a_container_has_what_its_cgroup_says(tmp_path: Path) -> None:
    (tmp_path / "memory.max").write_text("max\n")
    physical = host_bytes(tmp_path / "memory.max")
    assert physical == host_bytes(tmp_path / "nothing") > 2**28
    (tmp_path / "memory.max").write_text("100000000\n")
    assert host_bytes(tmp_path / "memory.max") == 100_000_000


def test_processes_on_the_cpu_share_its_memory() -> None:
    settings = Settings(device_memory="50%", host_memory="1MB")
    alone, shared = budgets(settings, "cpu", ["cpu"]), budgets(settings, "cpu", ["cpu", "cuda:0"])
    assert abs(alone[0] - 2 * shared[0]) <= 2 and alone[1] == shared[1] == 1_000_000
    assert abs(alone[0] - host_bytes() // 2) <= 1


@pytest.mark.parametrize(
    ("devices", "share"),
    [(["cuda:0"], 1), (["cuda:0", "cuda:1"], 1), (["cuda:0", "cuda:0", "cuda:1"], 2), (["cuda", "cuda:0", "cpu"], 2)],
)
def test_processes_on_one_gpu_share_its_memory(monkeypatch: pytest.MonkeyPatch, devices: list[str], share: int) -> None:
    """The driver's answer is played: what is held here is who shares it."""
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=80_000_000_000))
    settings = Settings(device_memory="50%", host_memory="1MB")
    assert budgets(settings, devices[0], devices) == (40_000_000_000 // share, 1_000_000)
