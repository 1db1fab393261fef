"""The command line as a user calls it, in this process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import cache

import torch
from typer import testing
from typer.testing import CliRunner, Result

from app.cli.commands import app

Run = Callable[..., Result]

testing._get_command = cache(testing._get_command)  # the tree of commands, built once


def call(*words: object) -> Result:
    """Run a command. The number of torch's threads and where logs go are afterwards what they were before."""
    threads, root = torch.get_num_threads(), logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        return CliRunner().invoke(app, [str(word) for word in words])
    finally:
        torch.set_num_threads(threads)
        root.handlers[:] = handlers
        root.setLevel(level)


def one_line(result: Result) -> str:
    """The single line of a failed command; asserts that it is one, on stderr, with exit code 1."""
    assert result.exit_code == 1
    assert "Traceback" not in result.output
    lines = result.stderr.splitlines()
    assert len(lines) == 1 and lines[0].startswith("instep: "), result.stderr
    return lines[0].removeprefix("instep: ")
