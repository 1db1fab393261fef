"""`instep models convert`: the DiT authors' `.pt`, once and offline, to a folder that the server loads.

Knows nothing of how: app/checkpoints/convert.py does it.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from app.cards.files import INDEX, read_labels
from app.cli.serve import Folder, read_settings

LABELLED = ("dit-xl-2-256", "dit-xl-2-512")
"""Cards whose index names the 1000 classes of ImageNet."""


def convert(
    file: Annotated[
        Path,
        typer.Argument(
            help="The authors' .pt, or one that their train.py saved (its EMA is taken); or a folder of diffusers' .bin"
        ),
    ],
    folder: Annotated[Path, typer.Argument(help="Folder to write, <models>/<id>; it must not exist, or see --replace")],
    vae: Annotated[
        Path | None,
        typer.Option(
            show_default=False,
            help="The VAE, which is copied: sd-vae-ft-ema's folder, or its safetensors in ldm names; a .pt has none",
        ),
    ] = None,
    dtype: Annotated[
        Literal["bfloat16", "float16", "float32"] | None,
        typer.Option(help="Number format of the network's weights; none: the file's own", show_default=False),
    ] = None,
    heads: Annotated[
        int | None, typer.Option(min=1, help="Attention heads, for a width that is not the authors'")
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="FOLDER may be a card without weights; its facts are kept")
    ] = False,
    models: Folder = None,
) -> None:
    """Convert a DiT's torch files to a model: a card and safetensors in diffusers' names."""
    import torch

    from app.checkpoints.convert import Conversion, convert_dit

    shipped = [read_settings(models=models).models / card for card in LABELLED]
    indices = [place / INDEX for place in (*[file] * file.is_dir(), *[folder] * replace, *shipped)]
    labels = next((names for one in indices if one.is_file() and (names := read_labels(one))), ())
    wanted = Conversion(file, folder, vae, dtype and getattr(torch, dtype), heads, labels, replace)
    convert_dit(wanted, typer.echo)
    typer.echo(f"next: instep serve --models {folder.parent}")
