"""`instep generate | compare`: pictures by an engine in this process, and the curl that asks a server for the same."""

from __future__ import annotations

import itertools
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from safetensors.numpy import save_file

from app.cards.card import Card
from app.cards.catalog import Registry
from app.cli.options import (
    NESTED,
    Folder,
    Labels,
    Loras,
    Out,
    body_flags,
    find,
    nested,
    open_registry,
    read_settings,
    with_flags,
)
from app.cli.paint import bars_of, draw, half_blocks, say
from app.errors import InstepError, InvalidValue
from app.imaging import Format, grid
from app.jobs.body import ImageBody, read_body
from app.jobs.compare import CompareBody, cells, panel_file, panel_warnings, read_comparison, with_model
from app.jobs.edit import EditBody, read_edit, with_source
from app.jobs.job import Job
from app.jobs.replies import file_groups, files_of, overlaid, warnings
from app.jobs.schema import curl as post
from app.report import Result
from app.settings import Settings
from app.source import look, read_source

Body = dict[str, Any]
Files = dict[str, Path]
_FILE = partial(typer.Option, exists=True, dir_okay=False)
_IDS = re.compile(r"[0-9]{1,9}(,[0-9]{1,9})+")
KINDS: dict[str, Format] = {".png": "png", ".jpg": "jpeg", ".jpeg": "jpeg", ".webp": "webp"}


@with_flags(body_flags(EditBody) | NESTED)
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw")] = None,
    image: Annotated[Path | None, _FILE(help="Start from this picture: PNG, JPEG or WebP")] = None,
    mask: Annotated[Path | None, _FILE(help="Change it where this one is transparent, or white")] = None,
    class_label: Labels = None,
    lora: Loras = None,
    columns: Annotated[int | None, typer.Option(help="One file with all images, this many in a row")] = None,
    out: Out = None,
    save_latents: Annotated[Path | None, typer.Option(help="Also write the final float32 latents here")] = None,
    models: Folder = None,
    **fields: Any,
) -> None:
    """Draw one request without a server, and show it in the terminal."""
    settings = read_settings(models=models)
    registry = open_registry(settings, fields["model"], loras=lora)
    fields = nested(fields) | {"prompt": prompt, "class_label": labels_of(class_label), "loras": loras_of(lora)}
    fields |= {"grid": None if columns is None else {"columns": columns}, "output_format": out and kind_of(out)}
    files = {name: file for name, file in (("image", image), ("mask", mask)) if file}
    job = build(fields, registry, "generate", files, keep_latents=bool(save_latents and in_folder(save_latents)))
    start = time.monotonic()
    (results,) = draw([job], settings, registry.cards, bars_of(Console(stderr=True), [job], image_of))
    console, out = Console(), out or file_name(job)
    deliver(console, job, results, out, time.monotonic() - start)
    if save_latents:
        write_latents(save_latents, results)
        say(console, f"latents {save_latents}")
    say(console, curl(job, settings, out, files))


@with_flags(body_flags(CompareBody, "model", "n") | NESTED)
def compare(
    model: Annotated[
        list[str] | None, typer.Argument(metavar="MODEL", help="Model ids or aliases, one for each column")
    ] = None,
    prompt: Annotated[list[str] | None, typer.Option(help="What to draw; repeat it for another row")] = None,
    class_label: Labels = None,
    lora: Loras = None,
    out: Out = None,
    models: Folder = None,
    **fields: Any,
) -> None:
    """Draw the same prompts or classes with several models, as one panel with a column for each model."""
    settings = read_settings(models=models)
    registry = open_registry(settings, *(model or ()), loras=lora)
    fields = nested(fields) | {"models": model or None, "prompt": prompt or None, "class_label": labels_of(class_label)}
    fields |= {"loras": loras_of(lora), "output_format": out and kind_of(out)}
    comparison, jobs = plan(fields, registry)
    out = out or Path(f"compare-{comparison.seed}.png")
    start = time.monotonic()
    try:
        drawn = draw(jobs, settings, registry.cards, bars(jobs, Console(stderr=True)))
    except InstepError as error:
        raise with_model(jobs, error) from None
    results = [result for (result,) in drawn]
    out.write_bytes(panel_file(comparison, jobs, results)[0])
    for warning in panel_warnings(comparison, jobs, results):
        print(f"instep: {warning}", file=sys.stderr)
    console, seconds = Console(), time.monotonic() - start
    say(console, f"{out}  seed {comparison.seed}  {len(results)} pictures  {seconds:.1f} s with loading")
    say(console, curl_of("images/compare", comparison.facts(), jobs[0].format, settings, out))


def image_of(job: Job, index: int) -> str:
    """The name of the bar of one image."""
    return f"image {index + 1}"


def bars(jobs: list[Job], console: Console) -> Progress:
    """A bar for each model, and a line when all of its pictures are there."""
    made = bars_of(console, jobs, lambda job, _: job.card.id)

    def tell(model: str, _: object) -> None:
        own = [job for job in jobs if job.card.id == model]
        if all(job.results for job in own):
            say(console, f"{model}: {'1 picture' if len(own) == 1 else f'{len(own)} pictures'}")

    for job in jobs:
        job.future.add_done_callback(partial(tell, job.card.id))
    return made


def deliver(console: Console, job: Job, results: list[Result], out: Path, seconds: float) -> None:
    """Write the file, or name-1, name-2, ...; for each the picture where the terminal can, then path, seed, seconds."""
    groups = file_groups(job, results)
    files, _ = files_of(job, results)
    for number, (group, file) in enumerate(zip(groups, files, strict=True), 1):
        path = out if len(files) == 1 else out.with_stem(f"{out.stem}-{number}")
        path.write_bytes(file)
        if console.is_terminal:
            pixels = grid([overlaid(job, result) for result in group], job.columns or 1)
            console.print(half_blocks(pixels, min(console.width, 64)))
        drawn = max(one.timings.encode + one.timings.denoise + one.timings.decode for one in group)
        say(console, f"{path}  {job.card.id}  seed {group[0].seed}  {drawn:.2f} s ({seconds:.1f} s with loading)")
    for warning in warnings(job, results):
        print(f"instep: {warning}", file=sys.stderr)


def write_latents(file: Path, results: list[Result]) -> None:
    """The final latents, float32 [n, C, h, w], as the one tensor `latents` of a safetensors file."""
    stacked = np.stack([result.latents for result in results if result.latents is not None])
    save_file({"latents": np.ascontiguousarray(stacked, np.float32)}, file, {"seed": str(results[0].seed)})


def build(
    body: Body, registry: Registry, request_id: str, files: Files | None = None, *, keep_latents: bool = False
) -> Job:
    """What a server would make of this body, with these files. Raises InstepError as a server would answer it."""
    card = find(registry, body.get("model"))
    if not files or "image" not in files:
        others = [name for name in EditBody.model_fields.keys() - ImageBody.model_fields if body.get(name) is not None]
        if name := next(iter((*(files or ()), *others)), None):
            raise InvalidValue(f"{name}: needs a picture, --image", param=name)
        return _job(card, read_body(body), request_id, registry, keep_latents)
    edit = read_edit(body).sized(card, *look(files["image"]))
    job = _job(card, edit, request_id, registry, keep_latents)
    source = read_source(files["image"], files.get("mask"), False, *edit.reading(job.request.recipe))
    job.request = with_source(job.request, source)
    return job


def plan(body: Body, registry: Registry) -> tuple[CompareBody, list[Job]]:
    """The same of a comparison: its body, complete, and the job of each cell."""
    numbers, comparison = itertools.count(), read_comparison(body, registry)
    return comparison, cells(
        comparison, registry, lambda card, one: _job(card, one, f"compare-{next(numbers)}", registry)
    )


def _job(card: Card, body: ImageBody, request_id: str, registry: Registry, keep_latents: bool = False) -> Job:
    refiner = body.refined_by(card, registry)
    request = body.to_request(card, request_id, adapters=card.adapters, refiner=refiner)
    delivery = replace(request.delivery, progress=True, keep_latents=keep_latents)
    return Job(replace(request, delivery=delivery), card, body, body.output_format or "png", raw=True, refiner=refiner)


def curl(job: Job, settings: Settings, out: Path, files: Files | None = None) -> str:
    """The shell command that asks a server with these settings for the same; several images come as one sheet."""
    body = {"model": job.card.id, **job.body.model_dump(exclude_none=True), "seed": job.request.images[0].seed}
    if len(job.request.images) > 1:
        body.setdefault("grid", {"columns": len(job.request.images)})
    return curl_of("images/edits" if files else "images/generations", body, job.format, settings, out, files)


def curl_of(route: str, body: Body, format: Format, settings: Settings, out: Path, files: Files | None = None) -> str:
    """The shell command that posts this body to a route of a server with these settings, for the file alone."""
    host = "localhost" if settings.host in ("127.0.0.1", "0.0.0.0", "::") else settings.host
    return post(f"{f'[{host}]' if ':' in host else host}:{settings.port}", route, body, format, out, files=files)


def loras_of(words: Sequence[str] | None) -> list[Body] | None:
    """The field `loras` for words as "ink:0.8". Raises InvalidValue."""
    pairs = [word.partition(":")[::2] for word in words or ()]
    try:
        return [{"name": name, "weight": float(weight or 1)} for name, weight in pairs] or None
    except ValueError:
        raise InvalidValue("--lora: expects NAME or NAME:WEIGHT, as ink:0.8", param="loras") from None


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
