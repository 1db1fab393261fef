"""Options of several commands: flags that are made from the settings and from a body, and what they are read into."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, TypeVar, get_args

import typer
from pydantic import BaseModel, ValidationError
from pydantic_settings import SettingsError as SourceError

from app.cards.card import Card
from app.cards.cards import read_cards
from app.cards.catalog import Registry
from app.errors import InvalidValue, ModelNotFound, SettingsError, first_problem
from app.settings import LISTS, Settings

Command = TypeVar("Command", bound=Callable[..., None])

Folder = Annotated[str | None, typer.Option(help="Folder of cards (INSTEP_MODELS)", metavar="PATH")]
"""--models of every command. A string, so that an empty one is none and not this folder."""

Model = Annotated[str | None, typer.Option(help="A model id or alias")]
Labels = Annotated[
    list[str] | None, typer.Option(help="Class id or name, for a model of classes; repeat it for more, or 162,247")
]
Loras = Annotated[
    list[str] | None,
    typer.Option("--lora", help="A LoRA and its weight, 1 without; repeat it for more", metavar="NAME:WEIGHT"),
]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="File to write: .png, .jpg or .webp")]

TYPES: dict[str, type] = {"string": str, "integer": int, "number": float, "boolean": bool}

SHORT = {
    "num_inference_steps": "--steps", "guidance_scale": "--guidance", "negative_prompt": "--negative", "n": "-n",
}  # fmt: skip
"""Shorter names of flags, beside those of the body's fields."""

WITHOUT = {
    *("prompt", "class_label", "models", "response_format", "output_format", "stream", "partial_images"),
    *("progress", "priority", "deadline"),
}
"""Fields of a body that have no flag, because a command takes them in another way, or because a server answers."""

NESTED: dict[str, Any] = {
    "refiner": Annotated[str | None, typer.Option(help='A model that draws the last part; "none" draws without')],
    "switch_at": Annotated[float | None, typer.Option(help="The share after which the refiner draws; 0.8 by default")],
    "crop": Annotated[tuple[int, int] | None, typer.Option(help="SDXL: where to cut", metavar="LEFT TOP")],
}
"""Flags for fields that are objects or lists; `nested` turns their values into these fields."""

_METAVARS: dict[Any, str | None] = {bool: None, int: "INTEGER", float: "FLOAT", Path: "PATH"}
"""What stands for a value of these types; all others are text."""


def read_settings(**flags: Any) -> Settings:
    """Settings from the environment and these flags; a flag that is None or empty does not count.

    Raises SettingsError, naming the setting.
    """
    try:
        return Settings(**{name: value for name, value in flags.items() if value is not None and str(value).strip()})
    except ValidationError as error:
        place, reason = first_problem(error.errors())
        name = place[0] if place else ""
        raise SettingsError(f"--{name.replace('_', '-')} (INSTEP_{name.upper()}): {reason}", param=name) from error
    except SourceError as error:
        raise SettingsError(str(error)) from error


def with_flags(flags: Mapping[str, Any]) -> Callable[[Command], Command]:
    """Give a command an optional flag for each of these annotations by name, in place of its `**` parameter."""

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
        metavar = f"[{'|'.join(choices)}]" if choices else _METAVARS.get(field.annotation, "TEXT")
        text = f"{field.description}; default {field.default if str(field.default) else 'empty'}"
        kind: Any = bool if field.annotation is bool else list[str] if name in LISTS else str
        flags[name] = Annotated[kind | None, typer.Option(help=text, show_default=False, metavar=metavar)]
    return flags


def body_flags(body: type[BaseModel], *without: str) -> dict[str, Any]:
    """A flag for each field of a body but these, with the type and the words of its JSON schema."""
    found = {}
    for name, schema in body.model_json_schema()["properties"].items():
        types = [TYPES[one["type"]] for one in schema.get("anyOf", ()) if one.get("type") in TYPES]
        if types and name not in {*WITHOUT, *without}:
            flag = f"--{name.replace('_', '-')}"
            names = [*([SHORT[name]] if name in SHORT else []), f"{flag}/--no{flag[1:]}" if bool in types else flag]
            option = typer.Option(*names, help=schema["description"], show_default=False)
            found[name] = Annotated[types[0] | None, option]
    return found


def nested(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The fields of a body, with the values of the flags of NESTED in their places. Raises InvalidValue."""
    found = {name: value for name, value in fields.items() if name != "switch_at"}
    if found.get("refiner"):
        switch = {"switch_at": fields["switch_at"]} if fields.get("switch_at") is not None else {}
        found["refiner"] = {"model": found["refiner"], **switch}
    elif fields.get("switch_at") is not None:
        raise InvalidValue("--switch-at: needs --refiner beside it", param="switch_at")
    return found | ({"crop": [*found["crop"]]} if found.get("crop") else {})


def open_registry(settings: Settings, *models: str | None, loras: object = None) -> Registry:
    """The cards of the settings' folder by name; with the LoRAs if some are wanted, or one of these models is a variant
    with some: to see what they fit takes seconds. Raises SettingsError, ModelNotFound, LoadError."""
    registry = Registry(read_cards(settings.models, settings.alias), settings)
    if settings.adapters and (loras or any(find(registry, name).loras for name in models)):
        from app.checkpoints.adapters import survey  # late: torch and the model libraries take seconds

        found = survey(settings.adapters, registry.all.models)
        registry = Registry(registry.all, settings, {one.name: one for one in found})
    return registry


def find(registry: Registry, name: str | None) -> Card:
    """The card of this name. Raises ModelNotFound, which says why where its card was skipped."""
    try:
        return registry.find(name)
    except ModelNotFound as error:
        raise ModelNotFound(f"{error.message}{registry.all.reason(name or '')}", param=error.param) from None
