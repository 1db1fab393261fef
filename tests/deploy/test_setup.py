"""`deploy/setup`, which `make setup` and the Dockerfile run: which torch it takes, how it asks pip, what it prints.

pip and nvidia-smi are stand-ins that note down how they are called; everything else is the script as it is.
"""

from __future__ import annotations

import os
import pty
import re
import shutil
import subprocess
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent.parent
INDEX = "https://download.pytorch.org/whl/cpu"
TOOLS = ("bash", "grep", "sed", "sleep", "tail", "timeout")
PIN = re.search(r"^torch==(\S+)$", (ROOT / "constraints.txt").read_text(encoding="utf-8"), re.MULTILINE)[1]
REST = "--constraint constraints.txt --editable .[dev]"
PYTHON = """\
#!{bash}
case "$1" in
-c) [ -n "$HAVE" ] && echo "$HAVE" || exit 1 ;;
*) shift 3
   echo "$*" >> calls
   echo "Downloading a great deal"
   case "$*" in *"$REFUSED"*) echo "no such index"; exit 1 ;; esac ;;
esac
"""


@dataclass(frozen=True)
class Done:
    """What a run printed, its exit status, and the arguments of every call of `pip install`."""

    lines: list[str]
    errors: str
    status: int
    calls: list[str]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A checkout with the tools that the script may use, and a virtual environment with the stand-in of pip."""
    for name in TOOLS:
        (tmp_path / "tools").mkdir(exist_ok=True)
        (tmp_path / "tools" / name).symlink_to(str(shutil.which(name)))
    shutil.copy(ROOT / "constraints.txt", tmp_path)
    (tmp_path / ".venv" / "bin").mkdir(parents=True)
    executable(tmp_path / ".venv" / "bin" / "python", PYTHON.format(bash=shutil.which("bash")))
    return tmp_path


def executable(file: Path, text: str) -> None:
    file.write_text(text, encoding="utf-8")
    file.chmod(0o755)


def gpu(folder: Path, status: int) -> None:
    executable(folder / "tools" / "nvidia-smi", f"#!{shutil.which('bash')}\necho 'a table of GPUs'\nexit {status}\n")


def setup(folder: Path, torch: str | None = None, refused: str = "nothing", have: str = "") -> Done:
    """Run the script. refused: what pip fails on when its arguments have it. have: the torch that is installed."""
    environment = {"PATH": str(folder / "tools"), "REFUSED": refused, "HAVE": have}
    environment |= {} if torch is None else {"TORCH": torch}
    words = [str(ROOT / "deploy" / "setup"), ".venv", "--editable", ".[dev]"]
    done = subprocess.run(
        [str(folder / "tools" / "bash"), *words],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    calls = folder / "calls"
    made = calls.read_text(encoding="utf-8").splitlines() if calls.exists() else []
    return Done(done.stdout.splitlines(), done.stderr, done.returncode, made)


@pytest.mark.parametrize(
    ("answers", "torch", "size"),
    [
        (0, None, "CUDA build, about 3 GB"),
        (0, "auto", "CUDA build, about 3 GB"),
        (0, "cpu", "CPU build, about 200 MB"),
        (9, None, "CPU build, about 200 MB"),
        (None, None, "CPU build, about 200 MB"),
        (None, "cuda", "CUDA build, about 3 GB"),
    ],
)
def test_the_build_of_torch(folder: Path, answers: int | None, torch: str | None, size: str) -> None:
    """CUDA where nvidia-smi answers, else the CPU; TORCH says otherwise. Two calls of pip, a line each."""
    if answers is not None:
        gpu(folder, answers)
    done = setup(folder, torch)
    assert (done.status, done.errors, len(done.lines)) == (0, "", 2), done
    assert re.fullmatch(rf"setup: torch, the {size} \.\.\. \d+ s", done.lines[0])
    assert re.fullmatch(r"setup: all the rest, about 200 MB \.\.\. \d+ s", done.lines[1])
    first, second = done.calls
    assert second == REST and first.split()[-1] == "torch"
    assert (INDEX in first, "--no-deps" in first) == ("CPU" in size, "CPU" in size)
    assert all(("--retries 0" in call) == (INDEX in call) for call in done.calls)


def test_an_index_that_cannot_be_reached_costs_one_call_and_one_line(folder: Path) -> None:
    done = setup(folder, refused=INDEX)
    assert (done.status, done.errors, len(done.lines)) == (0, "", 3), done
    assert done.lines[0].endswith(
        "... not to be had from https://download.pytorch.org; what pip has elsewhere is taken"
    )
    assert [INDEX in call for call in done.calls] == [True, False, False]
    assert done.calls[1:] == ["--constraint constraints.txt torch", REST]


@pytest.mark.parametrize(("have", "asked"), [(PIN, 1), (f"{PIN}+cpu", 1), ("2.0.0", 2), ("", 2)])
def test_a_torch_that_is_here_is_not_asked_for(folder: Path, have: str, asked: int) -> None:
    done = setup(folder, have=have)
    assert (done.status, len(done.calls), done.calls[-1]) == (0, asked, REST)
    assert (done.lines[0] == f"setup: torch {have} is here") == (asked == 1)


def test_a_cpu_build_gives_way_to_cuda(folder: Path) -> None:
    gpu(folder, 0)
    assert "--force-reinstall torch" in setup(folder, have=f"{PIN}+cpu").calls[0]


def test_a_failure_shows_what_pip_printed_and_where_the_rest_is(folder: Path) -> None:
    done = setup(folder, refused="--editable")
    assert done.status == 1 and done.lines[-1] == "setup: all the rest, about 200 MB ... failed"
    assert done.errors.splitlines()[-2:] == ["no such index", "setup: all that pip printed is in .venv/setup.log"]


def test_an_unknown_build_is_one_line(folder: Path) -> None:
    done = setup(folder, "gpu")
    assert (done.status, done.lines, done.calls) == (1, [], [])
    assert done.errors == "setup: TORCH is auto, cpu or cuda, not gpu\n"


@pytest.mark.slow
def test_a_terminal_shows_seconds_and_what_pip_does(folder: Path) -> None:
    """Each line is rewritten in place, and is no longer than a terminal is wide."""
    python = folder / ".venv" / "bin" / "python"
    executable(python, python.read_text(encoding="utf-8").replace('a great deal"', 'a great deal"; sleep 3'))
    ours, theirs = pty.openpty()
    words = [str(folder / "tools" / "bash"), str(ROOT / "deploy" / "setup"), ".venv", "--editable", ".[dev]"]
    environment = {"PATH": str(folder / "tools"), "REFUSED": "nothing", "HAVE": ""}
    subprocess.run(words, cwd=folder, env=environment, stdout=theirs, timeout=60, check=True)
    shown = os.read(ours, 65536).decode().replace("\x1b[K", "\r").splitlines()
    os.close(ours), os.close(theirs)
    lines = [line for line in shown if line]
    assert any(re.fullmatch(r"setup: torch, the CPU build, about 200 MB \.\.\. \d s  Downloading a", x) for x in lines)
    assert max(map(len, lines)) < 80
