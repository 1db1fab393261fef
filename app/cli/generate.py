"""`instep generate`: one request through an engine in this process: a file, and a painting in the terminal."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import typer
from rich.console import Console
from rich.progress import Progress
from safetensors.numpy import save_file

from app.cli import bodies
from app.cli.paint import bars_of, draw, follow, half_blocks, say
from app.cli.serve import Folder, read_settings, with_flags
from app.imaging import grid
from app.jobs.body import ImageBody
from app.jobs.job import Job
from app.jobs.replies import file_groups, files_of, warnings
from app.report import Result


@with_flags(bodies.flags(ImageBody))
def generate(
    prompt: Annotated[str | None, typer.Argument(help="What to draw")] = None,
    class_label: bodies.Labels = None,
    columns: Annotated[int | None, typer.Option(help="One file with all images, this many in a row")] = None,
    out: bodies.Out = None,
    save_latents: Annotated[Path | None, typer.Option(help="Also write the final float32 latents here")] = None,
    models: Folder = None,
    **fields: Any,
) -> None:
    """Draw one request without a server, and show it in the terminal."""
    settings = read_settings(models=models)
    registry = bodies.open_registry(settings)
    fields |= {"prompt": prompt, "class_label": bodies.labels_of(class_label)}
    fields |= {"grid": None if columns is None else {"columns": columns}, "output_format": out and bodies.kind_of(out)}
    job = bodies.build(fields, registry, "generate", keep_latents=bool(save_latents and bodies.in_folder(save_latents)))
    start = time.monotonic()
    (results,) = draw([job], settings, registry.cards, bars(job, Console(stderr=True)))
    console, out = Console(), out or bodies.file_name(job)
    deliver(console, job, results, out, time.monotonic() - start)
    if save_latents:
        write_latents(save_latents, results)
        say(console, f"latents {save_latents}")
    say(console, bodies.curl(job, settings, out))


def bars(job: Job, console: Console) -> Progress:
    """A bar for each image, seen from its first step on."""
    made = bars_of(console)
    follow([job], lambda _, index: f"image {index + 1}", made, ahead=False)
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
