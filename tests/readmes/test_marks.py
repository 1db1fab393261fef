"""Each block of the READMEs has a known mark; the commands of those that are only parsed name what exists."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from functools import cache

import pytest
import yaml

from app.settings import Settings
from tests.readmes.blocks import BLOCKS, MARKS, ROOT, Block, blocks_of

MOST_PARSED = 15
PARSED = [block for block in BLOCKS if block.mark == "parsed"]
VARIABLES = {f"INSTEP_{name.upper()}" for name in Settings.model_fields} | {"HF_TOKEN"}
SERVICES = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))["services"]
TARGETS = re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)


def commands(block: Block) -> list[tuple[dict[str, str], list[str]]]:
    """The variables and the words of each command of a block. Explanations after two spaces or # are left out."""
    found = []
    for line in block.text.replace("\\\n", " ").splitlines():
        words = shlex.split(re.sub(r"(?<=\S)   +[A-Za-z].*", "", line), comments=True)
        names = [word for word in words if re.match(r"[A-Z_]+=", word)]
        if words:
            found.append((dict(name.split("=", 1) for name in names), words[len(names) :]))
    return found


def flags(words: list[str]) -> set[str]:
    return {word.partition("=")[0] for word in words if word.startswith("--")}


def check_make(words: list[str]) -> None:
    assert set(words) <= set(TARGETS)


def check_docker(words: list[str]) -> None:
    """Profiles, and services with the arguments of their own program."""
    assert words.pop(0) == "compose"
    if words[0] == "--profile":
        assert any(words[1] in service.get("profiles", []) for service in SERVICES.values())
        words = words[2:]
    command, *rest = words
    assert command in ("up", "run", "restart", "kill") and flags(rest) <= {"--rm", "--signal"}
    assert command == "up" or next(word for word in rest if not word.startswith("-")) in SERVICES


@cache
def help_of(script: str) -> str:
    words = [sys.executable, script, "--help"]
    return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=100, check=True).stdout


def check_python(words: list[str]) -> None:
    """The flags of a script are in its --help."""
    assert (ROOT / words[0]).is_file() and flags(words) <= set(re.findall(r"--[\w-]+", help_of(words[0])))


CHECKS = {"make": check_make, "docker": check_docker, "python": check_python}


def parsed() -> list[object]:
    return [
        pytest.param(block, id=str(block), marks=(pytest.mark.slow,) if "python " in block.text else ())
        for block in PARSED
    ]


@pytest.mark.timeout(300)
@pytest.mark.parametrize("block", parsed())
def test_what_a_parsed_block_names_exists(block: Block) -> None:
    for variables, (program, *words) in commands(block):
        assert set(variables) <= VARIABLES
        if program in CHECKS:
            CHECKS[program](list(words))
        else:
            assert (ROOT / program).exists(), f"{block}: {program} is no file, and no program that is known here"


def test_every_block_has_a_known_mark() -> None:
    fences = sum(
        len(re.findall(r"^ *```", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE))
        for name in {block.document for block in BLOCKS}
    )
    assert fences == 2 * len(BLOCKS) > 20
    assert [str(block) for block in BLOCKS if block.mark not in MARKS or (block.file and block.mark != "run")] == []
    assert len(PARSED) <= MOST_PARSED


def test_a_block_without_a_mark_is_run() -> None:
    text = "# A\n```\na\n```\n## B\n<!-- shown -->\n```\nb\n```\n<!-- run: x.toml -->\n```toml\nc = 1\n```\n"
    first, second, third = blocks_of("x.md", text)
    assert [(one.mark, one.file, one.heading, one.text) for one in (first, second, third)] == [
        ("run", None, "A", "a\n"),
        ("shown", None, "B", "b\n"),
        ("run", "x.toml", "B", "c = 1\n"),
    ]
    assert (first.line, third.line, third.language) == (3, 12, "toml")


@pytest.mark.parametrize(
    "line",
    [
        "make everything",
        "docker compose run --rm push",
        "docker compose --profile tpu up -d",
        "INSTEP_NO_SUCH=1 docker compose up -d",
        "deploy/nothing.yml      what is not there",
        "kubectl apply -f instep.yml",
    ],
)
def test_what_does_not_exist_is_seen(line: str) -> None:
    with pytest.raises((AssertionError, ValueError)):
        test_what_a_parsed_block_names_exists(Block("x.md", 1, "", "parsed", None, "", f"{line}\n"))
