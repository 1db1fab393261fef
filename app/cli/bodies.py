"""Bodies: from the words of a command line to what a server makes of them, and the curl that asks for the same."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import BaseModel

from app.cards.card import Card, read_cards
from app.cards.catalog import Registry
from app.errors import InvalidValue, ModelNotFound
from app.imaging import Format
from app.jobs.body import read_body
from app.jobs.job import Job
from app.jobs.schema import curl as post
from app.settings import Settings

Body = dict[str, Any]
_IDS = re.compile(r"[0-9]{1,9}(,[0-9]{1,9})+")
KINDS: dict[str, Format] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}

TYPES: dict[str, type] = {"string": str, "integer": int, "number": float, "boolean": bool}

SHORT = {
    "num_inference_steps": "--steps", "guidance_scale": "--guidance", "negative_prompt": "--negative", "n": "-n",
}  # fmt: skip
"""Shorter names of flags, beside those of the body's fields."""

WITHOUT = {
    *("prompt", "class_label", "models", "response_format", "output_format", "stream", "partial_images"),
    *("priority", "deadline"),
}
"""Fields of a body that have no flag, because a command takes them in another way, or because a server answers."""

Model = Annotated[str | None, typer.Option(help="A model id or alias")]
Labels = Annotated[
    list[str] | None, typer.Option(help="Class id or name, for a model of classes; repeat it for more, or 162,247")
]
Out = Annotated[Path | None, typer.Option("-o", "--out", help="File to write: .png, .jpg or .webp")]


def flags(body: type[BaseModel], *without: str) -> dict[str, Any]:
    """A flag for each field of a body but these, with the type and the words of its JSON schema."""
    found = {}
    for name, schema in body.model_json_schema()["properties"].items():
        types = [TYPES[one["type"]] for one in schema.get("anyOf", ()) if one.get("type") in TYPES]
        if types and name not in {*WITHOUT, *without}:
            names = [*([SHORT[name]] if name in SHORT else []), f"--{name.replace('_', '-')}"]
            option = typer.Option(*names, help=schema["description"], show_default=False)
            found[name] = Annotated[types[0] | None, option]
    return found


def open_registry(settings: Settings) -> Registry:
    """The cards of the settings' folder by name. Raises SettingsError."""
    return Registry(read_cards(settings.models, settings.alias), settings)


def find(registry: Registry, name: str | None) -> Card:
    """The card of this name. Raises ModelNotFound, which says why where its card was skipped."""
    try:
        return registry.find(name)
    except ModelNotFound as error:
        raise ModelNotFound(f"{error.message}{registry.all.reason(name or '')}", param=error.param) from None


def build(body: Body, registry: Registry, request_id: str, *, keep_latents: bool = False) -> Job:
    """What a server would make of this body. Raises InstepError as a server would answer it."""
    card = find(registry, body.get("model"))
    read = read_body(body)
    request = read.to_request(card, request_id)
    request = replace(request, delivery=replace(request.delivery, progress=True, keep_latents=keep_latents))
    return Job(request, card, read, read.output_format or "png", raw=True)


def curl(job: Job, settings: Settings, out: Path) -> str:
    """The shell command that asks a server with these settings for the same; several images come as one sheet."""
    body = {"model": job.card.id, **job.body.model_dump(exclude_none=True), "seed": job.request.images[0].seed}
    if len(job.request.images) > 1:
        body.setdefault("grid", {"columns": len(job.request.images)})
    return curl_of("images/generations", body, job.format, settings, out)


def curl_of(route: str, body: Body, format: Format, settings: Settings, out: Path) -> str:
    """The shell command that posts this body to a route of a server with these settings, for the file alone."""
    host = "localhost" if settings.host in ("127.0.0.1", "0.0.0.0", "::") else settings.host
    return post(f"{f'[{host}]' if ':' in host else host}:{settings.port}", route, body, format, out)


def labels_of(given: Sequence[str] | None) -> str | list[str] | list[int] | None:
    """The class labels of --class-label: none, one, or several; "162,247" is a list of ids."""
    if given and _IDS.fullmatch(given[0]):
        return [int(index) for index in given[0].split(",")]
    return list(given) if given and len(given) > 1 else next(iter(given or ()), None)


def file_name(job: Job) -> Path:
    """A file name made of what was asked and the seed: red-apple-7.png."""
    slug = re.sub(r"[^a-z0-9]+", "-", job.shows.lower()).strip("-")[:48].strip("-")
    return Path(f"{slug or job.card.id}-{job.request.images[0].seed}.png")


def kind_of(out: Path) -> Format | None:
    """The format that the name of a picture asks for, None for PNG, which is the default.

    Checked before minutes of drawing: raises InvalidValue for a kind that is not written or a folder that is not there.
    """
    kind = KINDS.get(in_folder(out).suffix.lower())
    if kind is None:
        raise InvalidValue(f"{out}: the name must end in {', '.join(KINDS)}", param="out")
    return None if kind == "png" else kind


def in_folder(file: Path) -> Path:
    """The file, if its folder exists; else raises InvalidValue."""
    if not file.parent.is_dir():
        raise InvalidValue(f"{file}: there is no folder {file.parent}", param="out")
    return file
