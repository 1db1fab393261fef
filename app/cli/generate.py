"""`instep generate`: one request through an engine in this process, and the curl that asks a server for the same."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from safetensors.numpy import save_file

from app.cards.catalog import Registry
from app.cli.options import Folder, Labels, Out, body_flags, find, open_registry, read_settings, with_flags
from app.cli.paint import bars_of, draw, follow, half_blocks, say
from app.errors import InvalidValue
from app.imaging import Format, grid
from app.jobs.body import ImageBody, read_body
from app.jobs.job import Job
from app.jobs.replies import file_groups, files_of, warnings
from app.jobs.schema import curl as post
from app.report import Result
from app.settings import Settings

Body = dict[str, Any]
_IDS = re.compile(r"[0-9]{1,9}(,[0-9]{1,9})+")
KINDS: dict[str, Format] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


@with_flags(body_flags(ImageBody))
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw")] = None,
    class_label: Labels = None,
    columns: Annotated[int | None, typer.Option(help="One file with all images, this many in a row")] = None,
    out: Out = None,
    save_latents: Annotated[Path | None, typer.Option(help="Also write the final float32 latents here")] = None,
    models: Folder = None,
    **fields: Any,
) -> None:
    """Draw one request without a server, and show it in the terminal."""
    settings = read_settings(models=models)
    registry = open_registry(settings)
    fields |= {"prompt": prompt, "class_label": labels_of(class_label)}
    fields |= {"grid": None if columns is None else {"columns": columns}, "output_format": out and kind_of(out)}
    job = build(fields, registry, "generate", keep_latents=bool(save_latents and in_folder(save_latents)))
    start = time.monotonic()
    (results,) = draw([job], settings, registry.cards, bars(job, Console(stderr=True)))
    console, out = Console(), out or file_name(job)
    deliver(console, job, results, out, time.monotonic() - start)
    if save_latents:
        write_latents(save_latents, results)
        say(console, f"latents {save_latents}")
    say(console, curl(job, settings, out))


def bars(job: Job, console: Console) -> Progress:
    """A bar for each image."""
    made = bars_of(console)
    follow([job], lambda _, index: f"image {index + 1}", made)
    return made


def deliver(console: Console, job: Job, results: list[Result], out: Path, seconds: float) -> None:
    """Write the file, or name-1, name-2, ...; for each the picture where the terminal can, then path, seed, seconds."""
    groups = file_groups(job, results)
    files, _ = files_of(job, results)
    for number, (group, file) in enumerate(zip(groups, files, strict=True), 1):
        path = out if len(files) == 1 else out.with_stem(f"{out.stem}-{number}")
        path.write_bytes(file)
        if console.is_terminal:
            pixels = grid([result.pixels for result in group], job.columns or 1)
            console.print(half_blocks(pixels, min(console.width, 64)))
        drawn = max(one.timings.encode + one.timings.denoise + one.timings.decode for one in group)
        say(console, f"{path}  {job.card.id}  seed {group[0].seed}  {drawn:.2f} s ({seconds:.1f} s with loading)")
    for warning in warnings(job, results):
        print(f"instep: {warning}", file=sys.stderr)


def write_latents(file: Path, results: list[Result]) -> None:
    """The final latents, float32 [n, C, h, w], as the one tensor `latents` of a safetensors file."""
    stacked = np.stack([result.latents for result in results if result.latents is not None])
    save_file({"latents": np.ascontiguousarray(stacked, np.float32)}, file, {"seed": str(results[0].seed)})


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


def labels_of(words: Sequence[str] | None) -> str | list[str] | list[int] | None:
    """The class labels of --class-label: none, one, or several; "162,247" is a list of ids."""
    if words and _IDS.fullmatch(words[0]):
        return [int(index) for index in words[0].split(",")]
    return list(words) if words and len(words) > 1 else next(iter(words or ()), None)


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
