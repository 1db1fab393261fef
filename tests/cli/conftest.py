"""A Hub that the command line asks, and models that are on it."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.cli.pulls import SPARE, TOKEN
from tests.parts.commands import Run
from tests.parts.hub import Hub


@pytest.fixture
def models(tiny: Path, tmp_path: Path) -> Path:
    """The tiny models: tiny-sd3 is on the Hub as lab/tiny, tiny-sd3-turbo takes its components from there."""
    folder, repo = tmp_path / "models", tmp_path / "hub" / "lab" / "tiny"
    shutil.copytree(tiny, folder)
    shutil.copytree(tiny / "tiny-sd3", repo)
    for file in SPARE:
        (repo / file).parent.mkdir(exist_ok=True)
        (repo / file).write_bytes(b"spare")
    card = (repo / "card.toml").rename(tmp_path / "card.toml").read_text()
    shutil.rmtree(folder / "tiny-sd3")
    (folder / "tiny-sd3").mkdir()
    (folder / "tiny-sd3" / "card.toml").write_text(card.replace('path = "."', 'repo = "lab/tiny"'))
    return folder


@pytest.fixture
def hub(models: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """The Hub that this process asks, with an empty cache; nothing is gated, and no token is there."""
    with Hub(models.parent / "hub", token=TOKEN) as server:
        constants = "huggingface_hub.constants"
        monkeypatch.setattr(f"{constants}.ENDPOINT", server.url)
        template = f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", template)
        monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(models.parent / "home" / "hub"))
        monkeypatch.setattr(f"{constants}.HF_TOKEN_PATH", str(models.parent / "home" / "token"))
        monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda seconds: None)
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield server


@pytest.fixture
def pull(models: Path, run: Run) -> Callable[..., object]:
    return lambda *words: run("models", "pull", *words, "--models", models)
