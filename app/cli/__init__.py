"""The command line: its start. The tree of commands is `app/cli/commands.py`. The only home of typer and rich."""

import os
import signal
import sys


def main() -> None:
    """The console script.

    `instep serve` takes a signal for a wish to end from its first moment on, before it imports anything: until
    `app/main.py` starts something there is nothing to undo.
    """
    if sys.argv[1:2] == ["serve"]:
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: os._exit(0))
    from app.cli.commands import app  # takes most of a second

    app()
