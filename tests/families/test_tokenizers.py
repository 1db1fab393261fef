"""Tokenizers under a limit of memory: the first prompt may fail, those after it must not."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

PROMPTS = """
import resource, sys
from pathlib import Path
from app.families.components import build_tokenizer
tokenizer = build_tokenizer("T5TokenizerFast", Path(sys.argv[1]))
texts = [f"a red apple {number}" for number in range(64)]
pages = int(open("/proc/self/statm").read().split()[0])
resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 1_000_000, resource.RLIM_INFINITY))
try:
    tokenizer(texts)  # a thread's stack alone takes more than this
except BaseException as error:
    print("refused", type(error).__name__)
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
print("read", len(tokenizer(texts)["input_ids"]))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux's /proc")
def test_a_limit_at_the_first_prompt_is_over_when_the_limit_is(tiny: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    words = [sys.executable, "-c", PROMPTS, str(tiny / "tiny-sd3" / "tokenizer_3")]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=100)
    assert done.stdout.splitlines()[-1:] == ["read 64"], done.stderr[-500:]


@pytest.mark.parametrize(("users", "seen"), [("true", "true"), ("", "false"), (None, "false")])
def test_what_the_user_sets_for_tokenizers_counts(users: str | None, seen: str) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "TOKENIZERS_PARALLELISM"}
    if users is not None:
        environment["TOKENIZERS_PARALLELISM"] = users
    words = [sys.executable, "-c", "import app, os; print(os.environ['TOKENIZERS_PARALLELISM'])"]
    assert subprocess.run(words, env=environment, capture_output=True, text=True).stdout.strip() == seen
