"""The tiny models, and the command line as a user calls it, in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner, Result

from app.cli import app
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
