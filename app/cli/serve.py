"""`instep serve`: the settings as flags, made from `Settings`, and the server.

Knows nothing of what a setting means; a new field of `Settings` is a new flag here by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError as SourceError

from app.errors import SettingsError
from app.settings import Settings


def read_settings(**given: Any) -> Settings:
    """Settings from the environment and what is given; None is not given. Raises SettingsError, naming the setting."""
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        first = error.errors()[0]
        name = str(first["loc"][0]) if first["loc"] else ""
        raise SettingsError(
            f"--{name.replace('_', '-')} (INSTEP_{name.upper()}): {first['msg']}", param=name
        ) from error
    except SourceError as error:
        raise SettingsError(str(error)) from error


def with_flags(command: Callable[..., None]) -> Callable[..., None]:
    """Gives `command(**given)` one optional flag for each field of Settings."""
    parameters = []
    for name, field in Settings.model_fields.items():
        text = f"{field.description}; default {field.default if str(field.default) else 'empty'}"
        annotation: Any = field.annotation
        kind: Any = Annotated[annotation | None, typer.Option(help=text, show_default=False)]
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=kind))
    command.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return command


@with_flags
def serve(**given: Any) -> None:
    """Start the server. Every flag is an environment variable too (--max-wait: INSTEP_MAX_WAIT); the flag wins."""
    settings = read_settings(**given)
    from app import main  # fastapi takes half a second, which the other commands need not wait for

    main.serve(settings)
