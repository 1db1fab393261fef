"""The file of CONFIG: flags go before the environment, the environment before the file, and its errors are one line."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from app.cli.options import read_settings
from app.errors import SettingsError
from tests.parts.commands import call, one_line


def write(folder: Path, text: str) -> str:
    file = folder / "instep.toml"
    file.write_text(text, encoding="utf-8")
    return str(file)


def test_flags_go_before_the_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = write(tmp_path, 'drain = 1.5\nmax_wait = 2\nport = 1\ncompile = true\nmodels = "there"\n')
    monkeypatch.setenv("INSTEP_MAX_WAIT", "3")
    monkeypatch.setenv("INSTEP_PORT", "4")
    settings = read_settings(config=file, port=5)
    assert (settings.drain, settings.max_wait, settings.port) == (1.5, 3.0, 5)
    assert settings.compile and settings.models == Path("there") and settings.config == file


def test_the_environment_names_the_file_and_a_flag_another(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTEP_CONFIG", write(tmp_path, "port = 1"))
    assert read_settings().port == 1
    (tmp_path / "other").mkdir()
    assert read_settings(config=write(tmp_path / "other", "port = 2")).port == 2


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("max_weight = 1", "max_weight: no setting of this file"),
        ('api_keys = "sk-0123456789abcdef"', "api_keys: no setting of this file"),
        ('config = "other.toml"', "config: no setting of this file"),
        ("port = ", "Invalid value (at "),
        ("port = 70000", "--port (INSTEP_PORT): Input should be less than or equal to 65535"),
    ],
)
def test_a_file_that_is_wrong_is_one_line(tmp_path: Path, text: str, words: str) -> None:
    line = one_line(call("serve", "--config", write(tmp_path, text)))
    assert words in line and "sk-0123456789abcdef" not in line


@pytest.mark.parametrize("place", ["nowhere.toml", "."])
def test_a_file_that_cannot_be_read_is_one_line(tmp_path: Path, place: str) -> None:
    with pytest.raises(SettingsError, match=f"config: {tmp_path / place}: (No such file|Is a directory)"):
        read_settings(config=str(tmp_path / place))


def test_a_pipe_is_not_waited_for(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(SettingsError, match="a pipe, not a file"):
        read_settings(config=str(tmp_path / "pipe"))
