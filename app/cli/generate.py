"""`instep generate`: one request through an engine in this process: a file, and a painting in the terminal.

Knows nothing of defaults, limits or samplers.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TaskID, TextColumn
from safetensors.numpy import save_file

from app.cli.bodies import build, curl, file_name, in_folder, kind_of, labels_of, open_registry
from app.cli.paint import half_blocks
from app.cli.serve import Folder, read_settings
from app.imaging import grid
from app.jobs.local import Local, loading
from app.jobs.replies import Ask, raw_image
from app.jobs.warnings import warnings
from app.report import Progress as Step
from app.report import Report, Result
from app.request import Request


def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw")] = None,
    class_label: Annotated[
        list[str] | None, typer.Option(help="A class id or name, for a model of classes; again for more, or 162,247")
    ] = None,
    model: Annotated[str | None, typer.Option(help="A model id or alias")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps")] = None,
    guidance: Annotated[float | None, typer.Option(help="Guidance scale; 1 or less draws without")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of the first image; drawn if absent or -1")] = None,
    sampler: Annotated[str | None, typer.Option(help="The solver; `instep models show ID` lists them")] = None,
    size: Annotated[str | None, typer.Option(help="WxH in pixels")] = None,
    negative: Annotated[str | None, typer.Option(help="What guidance moves away from")] = None,
    n: Annotated[int | None, typer.Option("-n", help="Images, seeds counting up")] = None,
    columns: Annotated[int | None, typer.Option(help="One file of all images, so many in a row")] = None,
    out: Annotated[Path | None, typer.Option("-o", "--out", help="File to write: .png, .jpg or .webp")] = None,
    save_latents: Annotated[Path | None, typer.Option(help="Also write the final float32 latents here")] = None,
    models: Folder = None,
) -> None:
    """Draw one request without a server, and show it in the terminal."""
    settings = read_settings(models=models)
    registry = open_registry(settings)
    body: dict[str, Any] = {
        "prompt": prompt, "class_label": labels_of(class_label), "model": model, "num_inference_steps": steps,
        "guidance_scale": guidance, "seed": seed, "sampler": sampler, "size": size, "negative_prompt": negative, "n": n,
        "grid": None if columns is None else {"columns": columns}, "output_format": kind_of(out) if out else None,
    }  # fmt: skip
    ask = build(body, registry, "generate", keep_latents=bool(save_latents and in_folder(save_latents)))
    console = Console()
    start = time.monotonic()
    with Local(settings, registry.cards) as local:
        local.submit(ask.request)
        results = watch(local.reports(), ask.request, Console(stderr=True))
    deliver(console, ask, results, out or file_name(ask), time.monotonic() - start)
    if save_latents:
        write_latents(save_latents, results)
        say(console, f"latents {save_latents}")
    say(console, curl(ask, settings, out or file_name(ask)))


def say(console: Console, line: str) -> None:
    """A line as it is: not wrapped, not coloured, no markup read into it."""
    console.print(line, soft_wrap=True, highlight=False, markup=False)


def paths(out: Path, count: int) -> list[Path]:
    """The files of `count` images: the one named, or name-1, name-2, ..."""
    return [out] if count == 1 else [out.with_stem(f"{out.stem}-{index + 1}") for index in range(count)]


def watch(reports: Iterator[Report], request: Request, console: Console) -> list[Result]:
    """The images in order; a bar for each while they are drawn."""
    results: dict[int, Result] = {}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("steps"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bars:
        tasks: dict[int, TaskID] = {}
        for report in reports:
            if (line := loading(report)) and console.is_terminal:
                say(console, line)
            elif isinstance(report, Step):
                if report.index not in tasks:
                    tasks[report.index] = bars.add_task(f"image {report.index + 1}", total=report.steps)
                bars.update(tasks[report.index], completed=report.step)
            elif isinstance(report, Result):
                results[report.index] = report
                if len(results) == len(request.images):
                    break
    return [results[index] for index in range(len(request.images))]


def deliver(console: Console, ask: Ask, results: list[Result], out: Path, seconds: float) -> None:
    """Write the files; for each the picture in half-block cells where the terminal can, then path, seed, seconds."""
    files = [results] if ask.columns else [[result] for result in results]
    for group, path in zip(files, paths(out, len(files)), strict=True):
        path.write_bytes(raw_image(ask, group)[0])
        if console.is_terminal:
            pixels = grid([result.pixels for result in group], ask.columns or 1)
            console.print(half_blocks(pixels, min(console.width, 64)))
        drawn = max(one.timings.encode + one.timings.denoise + one.timings.decode for one in group)
        say(console, f"{path}  {ask.card.id}  seed {group[0].seed}  {drawn:.2f} s ({seconds:.1f} s with loading)")
    for warning in warnings(ask, results):
        print(f"instep: {warning}", file=sys.stderr)


def write_latents(file: Path, results: list[Result]) -> None:
    """The final latents, float32 [n, C, h, w], as the one tensor `latents` of a safetensors file."""
    stacked = np.stack([result.latents for result in results if result.latents is not None])
    save_file({"latents": np.ascontiguousarray(stacked, np.float32)}, file, {"seed": str(results[0].seed)})
