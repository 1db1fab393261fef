"""Commands: the tree of the command line, `instep serve | generate | compare | models | bench | demo`.

What goes wrong is one line on stderr and exit code 1.
"""

from __future__ import annotations

import os
import sys
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from app.cli import bench, compare, demo, files, generate, models, serve
from app.errors import InstepError


class OneLine(TyperGroup):
    """A group of commands whose errors are one line each, never a traceback."""

    def main(self, *args: Any, **options: Any) -> NoReturn:
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
        except InstepError as error:
            _fail(error.message)
        except typer.TyperException as error:
            if not error.message:  # help was asked for by giving no command, and has been printed
                sys.exit(0)
            _fail(error.format_message())
        except OSError as error:
            _fail(f"{error.filename}: {error.strerror}" if error.filename else str(error))
        except typer.Abort:
            _fail("aborted")
        except Exception as error:
            if os.environ.get("INSTEP_LOG_LEVEL") == "debug":
                raise
            _fail(f"internal error, {type(error).__name__}: {error} (INSTEP_LOG_LEVEL=debug shows where)")
        sys.exit(code if isinstance(code, int) else 0)


def _fail(message: str) -> NoReturn:
    # NOTE: names out of files may hold what a terminal obeys.
    line = "".join(letter if letter.isprintable() else "?" for letter in " ".join(message.split()))
    print(f"instep: {line}", file=sys.stderr)
    sys.exit(1)


app = typer.Typer(
    name="instep",
    cls=OneLine,
    help="Serve image diffusion transformers, batched at every denoising step.",
    add_completion=False,
    no_args_is_help=True,
)
app.command()(serve.serve)
app.command()(generate.generate)
app.command()(compare.compare)
models.app.command()(files.pull)
models.app.command()(files.convert)
models.app.command()(models.check)
models.app.command()(files.add)
app.add_typer(models.app, name="models")
app.add_typer(bench.app, name="bench")
app.command()(demo.demo)
