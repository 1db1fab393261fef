"""The tiny models, the command line as a user calls it, in this process, and a Hub that it asks."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from app.cli.commands import app
from tests.cli.hub import Hub
from tests.cli.pulls import SPARE, TOKEN
from tests.tiny import write_models

Run = Callable[..., Result]


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of the tiny models."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    return folder


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One folder of profiles for all tests, so that each shape is measured once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def run(tiny: Path, cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("generate", "red", ...)` on the tiny models, in an empty working folder."""
    for name, value in {"MODELS": tiny, "CACHE": cache, "DEVICES": "cpu", "DTYPE": "float32", "THREADS": 1}.items():
        monkeypatch.setenv(f"INSTEP_{name}", str(value))
    monkeypatch.chdir(tmp_path)
    threads = torch.get_num_threads()

    def call(*words: object) -> Result:
        try:
            return CliRunner().invoke(app, [str(word) for word in words])
        finally:
            torch.set_num_threads(threads)

    return call


def one_line(result: Result) -> str:
    """The single line of a failed command; asserts that it is one, on stderr, with exit code 1."""
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("instep: "), result.stderr
    return lines[0].removeprefix("instep: ")


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
        monkeypatch.setattr("app.checkpoints.hub.PAUSES", (0.0, 0.0, 0.0))
        for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
            monkeypatch.delenv(name, raising=False)
        yield server


@pytest.fixture
def pull(models: Path, run: Run) -> Callable[..., object]:
    return lambda *words: run("models", "pull", *words, "--models", models)
