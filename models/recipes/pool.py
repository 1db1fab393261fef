"""Encoded scenes on disk: drawn and encoded once, then read at random by every training of captions.

Of 6,144 scenes, used over and over, a network learned some by heart; a pool is as large as the disk has room for.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import astuple
from pathlib import Path

import numpy as np
import torch
from common import to_float
from data import SIZE, Scene, Subject, caption, draw_scene, load_subjects, render
from diffusers import AutoencoderKL
from loop import quick_bf16
from torch import Tensor
from tqdm import tqdm

SHAPE = (16, SIZE // 8, SIZE // 8)  # of one latent
PART = 64  # scenes encoded at once


def encoder(vae: AutoencoderKL, subjects: list[Subject]) -> Callable[[list[Scene]], np.ndarray]:
    """Scenes to latents, float16 [n, 16, 16, 16], scaled as a network sees them.

    The mean alone: the standard deviation that the VAE gives beside it is a thirtieth of the latents' own.
    """
    device, scale, shift = vae.device.type, vae.config.scaling_factor, vae.config.shift_factor
    vae.to(memory_format=torch.channels_last)  # more than twice as fast as the usual order on a CPU

    @torch.inference_mode()
    def encode(scenes: list[Scene]) -> np.ndarray:
        pictures = to_float([render(scene, subjects[scene.subject]) for scene in scenes]).to(device)
        with torch.autocast(device, torch.bfloat16, enabled=quick_bf16(device)):
            mean = vae.encode(pictures.contiguous(memory_format=torch.channels_last)).latent_dist.mean
        return ((mean.float() - shift) * scale).half().cpu().numpy()

    return encode


def fill(folder: Path, vae: AutoencoderKL, subjects: list[Subject], count: int, threads: int) -> None:
    """Write `count` random scenes and their latents into `folder`, unless a whole pool is there."""
    if (folder / "scenes.json").exists():
        return
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(count)
    scenes = [draw_scene(rng, subjects) for _ in range(count)]
    latents = np.lib.format.open_memmap(folder / "latents.npy", "w+", np.float16, (count, *SHAPE))
    encode, starts = encoder(vae, subjects), range(0, count, PART)
    with ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,)) as workers:
        parts = workers.map(encode, (scenes[at : at + PART] for at in starts))
        for at, part in zip(tqdm(starts, desc="encoding", mininterval=10), parts, strict=True):
            latents[at : at + PART] = part
    latents.flush()
    (folder / "scenes.json").write_text(json.dumps([astuple(scene) for scene in scenes]))


class Pool:
    """The scenes of a folder, for a training of `subjects`, which are those that `fill` was given."""

    def __init__(self, folder: Path, subjects: list[Subject], rng: np.random.Generator, device: str) -> None:
        self.subjects, self.rng, self.device = subjects, rng, device
        self.scenes = [Scene(*row) for row in json.loads((folder / "scenes.json").read_text())]
        self.latents = torch.from_numpy(np.load(folder / "latents.npy"))

    def batch(self, count: int, empty: float) -> tuple[Tensor, list[str]]:
        """`count` latents, float [count, 16, 16, 16], and captions written anew, each "" with probability `empty`."""
        index = self.rng.integers(len(self.scenes), size=count)
        scenes = [self.scenes[i] for i in index]
        captions = [caption(self.rng, s, self.subjects[s.subject]) for s in scenes]
        captions = ["" if self.rng.random() < empty else text for text in captions]
        return self.latents[torch.as_tensor(index)].float().to(self.device), captions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="where the emoji packages lie")
    parser.add_argument("--vae", type=Path, default=Path("models/emoji-mmdit/vae"))
    parser.add_argument("--out", type=Path, default=Path("runs/pool"))
    parser.add_argument("--count", type=int, default=49152)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    args = parser.parse_args()
    vae = AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32).to(args.device)
    fill(args.out, vae.requires_grad_(False), load_subjects(args.cache), args.count, args.threads)


if __name__ == "__main__":
    main()
