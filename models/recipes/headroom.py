"""How far a DiT is from the best denoiser there can be, by noise level.

A class (here those of the first style) stands for finitely many scenes, and the VAE makes of each a normal distribution
of latents, so the mean of what is behind a noisy latent is known exactly: the scenes' own means, weighted by how likely
each is (Karras et al. 2022, appendix B.3, for points). Printed are mean squared errors of the clean latent, whose
variance is 1: what the network's exceeds the best by is what more training or a larger network could still win.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import torch
from bound import TIMES, Levels
from common import to_float
from data import STYLES, Subject, every_plain_scene, load_subjects, render
from diffusers import AutoencoderKL
from folder import read_subjects
from torch import Tensor
from train_dit import build, classes

from app.families.dit import predict


def best(x: Tensor, alpha: Tensor, sigma: Tensor, mean: Tensor, std: Tensor, weights: Tensor) -> Tensor:
    """The expected clean latent behind x = alpha z + sigma noise, float [n, ...].

    z is drawn from the mixture of normals (mean, std), each float [m, ...], with probabilities `weights` [m].
    """
    variance = alpha**2 * std**2 + sigma**2
    gap = x[:, None] - alpha * mean
    log_likely = -0.5 * (gap**2 / variance + variance.log()).flatten(2).sum(2) + weights.log()
    behind = mean + alpha * std**2 / variance * gap
    return torch.einsum("nm,nm...->n...", log_likely.softmax(1), behind)


@torch.no_grad()
def errors(
    model: torch.nn.Module, vae: AutoencoderKL, subject: Subject, index: int, times: Tensor, count: int
) -> Tensor:
    """float [times, 2]: the best denoiser's and the network's mean squared error of the clean latent."""
    scenes, weights = every_plain_scene(index)
    posterior = vae.encode(to_float([render(scene, subject) for scene in scenes])).latent_dist
    mean = (posterior.mean - vae.config.shift_factor) * vae.config.scaling_factor
    std, weights, levels = posterior.std * vae.config.scaling_factor, torch.tensor(weights), Levels("cpu")
    rows = []
    for t in times:
        which = torch.multinomial(weights, count, replacement=True)
        clean = mean[which] + std[which] * torch.randn_like(mean[which])
        alpha, sigma = levels("alpha", t), levels("sigma", t)
        x = alpha * clean + sigma * torch.randn_like(clean)
        noise = predict(model, x, t.expand(count), torch.full((count,), index * len(STYLES))).chunk(2, dim=1)[0]
        guesses = best(x, alpha, sigma, mean, std, weights), (x - sigma * noise) / alpha
        rows.append([(guess - clean).pow(2).mean().item() for guess in guesses])
    return torch.tensor(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="where the emoji packages lie")
    parser.add_argument("--dit", type=Path, default=Path("models/emoji-dit"))
    parser.add_argument("--vae", type=Path, default=Path("models/emoji-mmdit/vae"))
    parser.add_argument("--subjects", type=int, default=24, help="how many, drawn at random but always alike")
    parser.add_argument("--count", type=int, default=32, help="noisy latents of each")
    args = parser.parse_args()
    subjects = read_subjects(args.dit, load_subjects(args.cache))
    model = build(len(classes(subjects)), args.dit)
    vae = AutoencoderKL.from_pretrained(args.vae, torch_dtype=torch.float32)
    torch.manual_seed(0)
    times = torch.arange(100, TIMES, 100)
    chosen = np.random.default_rng(0).choice(len(subjects), args.subjects, replace=False).tolist()
    found = torch.stack([errors(model, vae, subjects[i], i, times, args.count) for i in chosen]).mean(0)
    print("| timestep | best | network |\n| --- | --- | --- |")
    for t, (least, ours) in zip(times.tolist(), found.tolist(), strict=True):
        print(f"| {t} | {least:.3f} | {ours:.3f} |")


if __name__ == "__main__":
    main()
