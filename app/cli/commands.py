"""Commands: the tree of the command line, `instep serve | generate | compare | models | loras | bench | demo`.

What goes wrong is one line on stderr and exit code 1.
"""

import os
import sys
from functools import partial
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from app import logs
from app.cli import bench, demo, files, generate, models
from app.cli.options import read_settings, settings_flags, with_flags
from app.errors import InstepError
from app.settings import SECRETS, doubts


class OneLine(TyperGroup):
    """A group of commands whose errors are one line each, never a traceback."""

    def main(self, *args: Any, **options: Any) -> NoReturn:
        try:
            code = super().main(*args, **{**options, "standalone_mode": False})
        except InstepError as error:
            _fail(error.message)
        except typer.TyperException as error:
            if message := error.format_message():
                _fail(message)
            sys.exit(0)  # help was asked for by giving no command, and has been printed
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
    help="Serve image diffusion models, batched at every denoising step.",
    add_completion=False,
    no_args_is_help=True,
)


@app.command()
@with_flags(settings_flags())
def serve(**flags: Any) -> None:
    """Start the server. Every flag is an environment variable too (--max-wait: INSTEP_MAX_WAIT); the flag wins."""
    flags = {name: ",".join(value) if isinstance(value, list) else value for name, value in flags.items()}
    settings = read_settings(**flags)
    from app import main  # fastapi takes half a second, which the other commands need not wait for

    logs.setup(settings.log_level)
    for doubt in doubts(settings, flags, os.environ):
        logs.logger("instep").warning(doubt)
    reread = partial(read_settings, **{name: value for name, value in flags.items() if name not in SECRETS})
    main.serve(settings, reread=reread)


app.command()(generate.generate)
app.command()(generate.compare)
models.app.command()(files.pull)
models.app.command()(files.convert)
models.app.command()(models.check)
models.app.command()(files.add)
app.add_typer(models.app, name="models")
app.add_typer(models.loras, name="loras")
app.add_typer(bench.app, name="bench")
app.command()(demo.demo)
