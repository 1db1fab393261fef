"""Commands inside sentences and tables of the READMEs name programs, commands, flags and modules that exist."""

from __future__ import annotations

import re
import shlex

import pytest
from typer.main import get_command

from app.cli.commands import app
from tests.readmes.blocks import BLOCKS, ROOT, documents
from tests.readmes.test_marks import TARGETS, check_docker, flags

LAB_LOG = "models/LOG.md"
"""It says what was run on a day, with the scripts of that day."""


def inline() -> list[str]:
    """Each command once. Code of blocks is not inline."""
    found = set()
    for name in documents():
        if name != LAB_LOG:
            text = (ROOT / name).read_text(encoding="utf-8")
            for block in BLOCKS:
                text = text.replace(block.text, "") if block.document == name else text
            found |= set(re.findall(r"`((?:instep|make|docker compose|python -m) [^`]+)`", text))
    return sorted(found)


def check_instep(words: list[str]) -> None:
    """Alternatives are written `instep bench serve | image`."""
    first, *others = " ".join(words).split(" | ")
    words = first.split()
    for last in (words[-1], *others):
        command = get_command(app)
        rest = [*words[:-1], last]
        while rest and hasattr(command, "commands"):
            command = command.commands[rest.pop(0)]
        assert flags(rest) <= {name for param in command.params for name in param.opts}


def check_module(words: list[str]) -> None:
    text = (ROOT / f"{words[0].replace('.', '/')}.py").read_text(encoding="utf-8")
    assert [flag for flag in flags(words) if flag not in text] == []


def check(line: str) -> None:
    program, *words = shlex.split(line)
    if program == "instep":
        check_instep(words)
    elif program == "make":
        assert set(words) <= set(TARGETS)
    elif program == "docker":
        check_docker(words)
    else:
        check_module(words[1:])


@pytest.mark.parametrize("line", inline())
def test_a_command_in_a_sentence_exists(line: str) -> None:
    check(line)


@pytest.mark.parametrize(
    "line", ["instep model check", "instep bench serve | none", "instep demo --fast", "make all", "python -m tests.no"]
)
def test_one_that_does_not_is_seen(line: str) -> None:
    with pytest.raises((AssertionError, KeyError, OSError)):
        check(line)
