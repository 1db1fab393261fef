"""What the tests of `instep models pull` share: the files on their Hub, and where they are downloaded to."""

from __future__ import annotations

from pathlib import Path

from tests.parts.hub import COMMIT

TOKEN = "hf_secretsecretsecret"
SPARE = (
    *("sd3.safetensors", ".gitattributes", "README.md", "text_encoders/clip.safetensors", "vae/run.py"),
    *("text_encoder/pytorch_model.bin", "text_encoder/model.fp16.safetensors"),
    *("text_encoder_3/model.fp16-00001-of-00002.safetensors", "text_encoder_3/model.safetensors.index.fp16.json"),
)
"""What repositories of SD3 have besides, some of it larger than what is needed."""

VAE = "vae/diffusion_pytorch_model.safetensors"
NETWORK = "transformer/diffusion_pytorch_model.safetensors"


def cached(models: Path, path: str) -> Path:
    return models.parent / "home" / "hub" / "models--lab--tiny" / "snapshots" / COMMIT / path


def partials(models: Path) -> list[Path]:
    """What is still in the cache of files that did not arrive whole, or were not right."""
    home = models.parent / "home"
    return [file for pattern in ("*.incomplete", "incoming") for file in home.rglob(pattern)]
