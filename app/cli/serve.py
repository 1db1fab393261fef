"""`instep serve`: the settings as flags, made from `Settings`, and the server."""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer
from pydantic import ValidationError
from pydantic_settings import SettingsError as SourceError

from app import logs
from app.errors import SettingsError, first_problem
from app.settings import LISTS, Settings, doubts

Command = TypeVar("Command", bound=Callable[..., None])
Folder = Annotated[str | None, typer.Option(help="Folder of cards (INSTEP_MODELS)", metavar="PATH")]
"""--models of every command. A string, so that an empty one is none and not this folder."""

_METAVARS: dict[Any, str | None] = {bool: None, str: "TEXT", int: "INTEGER", float: "FLOAT", Path: "PATH"}


def read_settings(**given: Any) -> Settings:
    """Settings from the environment and what is given; None and "" are not given.

    Raises SettingsError, naming the setting.
    """
    try:
        return Settings(**{name: value for name, value in given.items() if value is not None and str(value).strip()})
    except ValidationError as error:
        place, reason = first_problem(error.errors())
        name = place[0] if place else ""
        raise SettingsError(f"--{name.replace('_', '-')} (INSTEP_{name.upper()}): {reason}", param=name) from error
    except SourceError as error:
        raise SettingsError(str(error)) from error


def with_flags(flags: Mapping[str, Any]) -> Callable[[Command], Command]:
    """Give a command one optional flag for each of these annotations by name, in place of its `**given`."""

    def replace(command: Command) -> Command:
        signature = inspect.signature(command, eval_str=True)
        own = [one for one in signature.parameters.values() if one.kind is not one.VAR_KEYWORD]
        added = [
            inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=flag)
            for name, flag in flags.items()
        ]
        command.__signature__ = signature.replace(parameters=[*own, *added])  # type: ignore[attr-defined]
        command.__annotations__ = {one.name: one.annotation for one in (*own, *added)}
        return command

    return replace


def settings_flags() -> dict[str, Any]:
    """A flag for each field of Settings: a switch, a list or text, which is checked where the environment's is."""
    flags = {}
    for name, field in Settings.model_fields.items():
        choices = get_args(field.annotation)
        metavar = f"[{'|'.join(choices)}]" if choices else _METAVARS[field.annotation]
        text = f"{field.description}; default {field.default if str(field.default) else 'empty'}"
        kind: Any = bool if field.annotation is bool else list[str] if name in LISTS else str
        flags[name] = Annotated[kind | None, typer.Option(help=text, show_default=False, metavar=metavar)]
    return flags


@with_flags(settings_flags())
def serve(**given: Any) -> None:
    """Start the server. Every flag is an environment variable too (--max-wait: INSTEP_MAX_WAIT); the flag wins."""
    given = {name: ",".join(value) if isinstance(value, list) else value for name, value in given.items()}
    settings = read_settings(**given)
    from app import main  # fastapi takes half a second, which the other commands need not wait for

    logs.setup(settings.log_level)
    for doubt in doubts(settings, given, os.environ):
        logs.logger("instep").warning(doubt)
    main.serve(settings)
