"""DEVICES, PRELOAD and THREADS, spelled out."""

import os
import shutil
import subprocess
import sys

import pytest
from huggingface_hub import constants

from app.cards.card import Source
from app.cards.cards import read_cards
from app.errors import SettingsError
from app.settings import Settings
from app.worker import plan
from tests.parts.engine import card
from tests.parts.supervising import CARDS


@pytest.fixture
def dev(tmp_path, monkeypatch):
    """A /dev with two GPUs and a CUDA build of torch."""
    for name in ("nvidia0", "nvidia1", "nvidiactl", "nvidia-uvm"):
        (tmp_path / name).touch()
    monkeypatch.setattr(plan.metadata, "version", lambda name: "2.13.0")
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    return tmp_path


def test_devices_as_written():
    assert plan.devices("cpu,cpu") == ["cpu", "cpu"]
    assert plan.devices(" cuda:1 , cuda:0,") == ["cuda:1", "cuda:0"]


@pytest.mark.parametrize("text", ["", ",", "gpu", "cuda:", "cuda:-1", "auto,cpu", "cpu:0", "cuda:٣", "cuda:1\x85x"])
def test_devices_that_make_no_sense(text):
    with pytest.raises(SettingsError, match="INSTEP_DEVICES"):
        plan.devices(text)


def test_auto_counts_device_files(dev, tmp_path):
    assert plan.devices("auto", dev) == ["cuda:0", "cuda:1"]
    (dev / "nvidia0").unlink()
    (dev / "nvidia1").unlink()
    assert plan.devices("auto", dev) == ["cpu"]


@pytest.mark.parametrize(
    ("visible", "count"), [("0", 1), ("1,0", 2), ("GPU-8932f937", 1), ("", 0), ("-1", 0), ("0,-1,1", 1), ("0,1,2", 2)]
)
def test_auto_reads_cuda_visible_devices(dev, monkeypatch, visible, count):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    assert plan.count_gpus(dev) == count


def test_auto_is_cpu_when_torch_cannot_use_a_gpu(dev, monkeypatch):
    monkeypatch.setattr(plan.metadata, "version", lambda name: "2.13.0+cpu")
    assert plan.devices("auto", dev) == ["cpu"]


def test_preloads_are_ids_each_once(tmp_path):
    cards = {"a": card("a", aliases=("one", "uno")), "b": card("b")}
    assert plan.preloads(Settings(preload=""), cards) == []
    assert plan.preloads(Settings(preload="b, uno,a,one"), cards) == ["b", "a"]
    with pytest.raises(SettingsError, match='no card is named "c"'):
        plan.preloads(Settings(preload="a,c"), cards)


def test_preload_of_all_leaves_out_what_is_not_here(tiny, tmp_path, monkeypatch):
    """Neither what is on the Hub, nor what takes a part from there: it would keep /readyz at 503 for ever."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    source = Source(repo="some/sd3", revision="main")
    cards = read_cards(tiny)
    assert plan.preloads(Settings(preload="all"), cards) == list(cards)
    cards["tiny-sd3"] = cards["tiny-sd3"].model_copy(update={"source": source, "folder": tmp_path})
    dits = [name for name in cards if "dit" in name]
    assert plan.preloads(Settings(preload="all"), cards) == dits
    wanted = Settings(preload="tiny-sd3-turbo")
    assert plan.preloads(wanted, cards) == ["tiny-sd3-turbo"], "who names it wants to be told that it is missing"
    repo = tmp_path / "hub" / "models--some--sd3"
    (repo / "refs").mkdir(parents=True)
    (repo / "refs" / "main").write_text("c0ffee")
    whole = shutil.copytree(tiny / "tiny-sd3", repo / "snapshots" / "c0ffee")
    assert plan.preloads(Settings(preload="all"), cards) == list(cards)
    for file in (whole / "vae").glob("*.safetensors"):
        file.rename(file.with_suffix(".bin"))
    assert plan.preloads(Settings(preload="all"), cards) == dits, "an index with torch files"


def test_threads_share_the_cores():
    cores = plan.cores()
    assert plan.threads(Settings(devices="cpu")) == cores
    assert plan.threads(Settings(devices="cpu,cpu")) == max(1, cores // 2)
    assert plan.threads(Settings(devices=",".join(["cpu"] * 1000))) == 1
    assert plan.threads(Settings(devices="cpu,cpu", threads=3)) == 3


QUOTAS = [("50000 100000", 1), ("150000 100000", 2), ("400000 100000", 4), ("max 100000", 8)]


@pytest.mark.parametrize("path", ["/", "/system.slice/instep.service"])
@pytest.mark.parametrize(("quota", "cores"), QUOTAS)
def test_a_container_or_a_unit_computes_with_what_its_quota_is_worth(tmp_path, monkeypatch, quota, cores, path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    mine, group = tmp_path / "mine", tmp_path / path.lstrip("/")
    mine.write_text(f"0::{path}\n")
    group.mkdir(parents=True, exist_ok=True)
    (group / "cpu.max").write_text(f"{quota}\n")
    assert plan.cores(tmp_path, mine) == cores
    assert plan.threads(Settings(devices="cpu"), tmp_path, mine) == cores


def test_the_narrowest_quota_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    mine, group = tmp_path / "mine", tmp_path / "a" / "b"
    mine.write_text("0::/a/b\n")
    group.mkdir(parents=True)
    (group / "cpu.max").write_text("400000 100000\n")
    (tmp_path / "a" / "cpu.max").write_text("200000 100000\n")
    assert plan.cores(tmp_path, mine) == 2


def test_without_a_quota_every_core_counts(tmp_path, monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(8)))
    assert plan.cores(tmp_path, tmp_path / "nothing") == plan.cores(tmp_path) == 8


def test_the_front_imports_no_torch():
    code = "import sys, app.worker.supervisor; print([m for m in ('torch', 'diffusers') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
    assert CARDS


def test_processes_on_one_device_have_names_of_their_own() -> None:
    assert plan.named(["cuda:0", "cpu", "cpu"]) == [("cuda:0", "cuda:0"), ("cpu", "cpu"), ("cpu#1", "cpu")]
