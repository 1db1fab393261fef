"""Train the AutoencoderKL that every built-in card shares: 128 x 128 pixels to 16 channels of 16 x 16.

Loss: L1, L2, L1 of the picture's gradients, and a small KL.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import save_grid, to_float
from data import SIZE, Subject, draw_scene, load_subjects, render
from diffusers import AutoencoderKL
from diffusers.models.downsampling import Downsample2D
from diffusers.models.resnet import ResnetBlock2D
from diffusers.models.upsampling import Upsample2D
from folder import save_bf16
from loop import Training, parse
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm

CHANNELS, LATENT = (16, 32, 64, 128), 16


def build() -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=CHANNELS,
        layers_per_block=1,
        latent_channels=LATENT,
        norm_num_groups=4,
        mid_block_add_attention=False,
        use_quant_conv=False,
        use_post_quant_conv=False,
        force_upcast=False,
        sample_size=SIZE,
    )
    return start_linear(vae)


@torch.no_grad()
def start_linear(vae: AutoencoderKL) -> AutoencoderKL:
    """Start every residual branch at zero and the resamplers near plain averages, copies and random differences.

    The picture then flows through from the first step: after 75 steps the loss is 1.0, the default start's 1.6.
    """
    for module in vae.modules():
        if isinstance(module, ResnetBlock2D):
            nn.init.zeros_(module.conv2.weight)
            nn.init.zeros_(module.conv2.bias)
            if module.conv_shortcut is not None:
                nn.init.orthogonal_(module.conv_shortcut.weight)
        elif isinstance(module, Upsample2D | Downsample2D):
            weight = module.conv.weight.mul_(0.3)
            channels = torch.arange(len(weight))
            if isinstance(module, Upsample2D):
                weight[channels, channels, 1, 1] += 1
            else:
                kinds = torch.rand(2, len(weight), 1, 1)
                weight[channels, channels, :2, :2] += 0.25 * (kinds[0] < 0.34)
                weight[channels, channels, :2, :2] += 0.4 * (kinds[1] < 0.7) * torch.randn(len(weight), 2, 2)
    vae.encoder.conv_out.weight[LATENT:] *= 0.1
    vae.encoder.conv_out.bias[LATENT:] = -6  # log variance: hardly any noise at first
    return vae


def batch(rng: np.random.Generator, subjects: list[Subject], size: int) -> Tensor:
    """Random scenes, every (subject, colour) pair: float [size, 3, 128, 128]."""
    scenes = [draw_scene(rng, subjects, every_pair=True) for _ in range(size)]
    return to_float([render(s, subjects[s.subject]) for s in scenes])


def edges(x: Tensor) -> tuple[Tensor, Tensor]:
    return x[..., 1:, :] - x[..., :-1, :], x[..., 1:] - x[..., :-1]


def loss_of(vae: AutoencoderKL, x: Tensor, kl: float) -> Tensor:
    posterior = vae.encode(x).latent_dist
    y = vae.decode(posterior.sample()).sample
    gradient = sum((a - b).abs().mean() for a, b in zip(edges(x), edges(y), strict=True))
    return (x - y).abs().mean() + 4 * F.mse_loss(y, x) + 0.5 * gradient + kl * posterior.kl().mean()


@torch.no_grad()
def evaluate(vae: AutoencoderKL, subjects: list[Subject], device: str, count: int = 1024) -> dict[str, float]:
    """PSNR in dB (mean over pictures, and from the mean squared error) and the latents' mean and deviation."""
    rng = np.random.default_rng(99)
    errors, latents = [], []
    for _ in range(0, count, 64):
        x = batch(rng, subjects, 64).to(device)
        posterior = vae.encode(x).latent_dist
        y = vae.decode(posterior.mean).sample.clamp(-1, 1)
        errors += ((x - y) / 2).pow(2).mean(dim=(1, 2, 3)).tolist()
        latents.append(posterior.sample().flatten())
    z = torch.cat(latents)
    psnr = float(np.mean([-10 * math.log10(e) for e in errors]))
    pooled = -10 * math.log10(float(np.mean(errors)))
    return {"psnr": psnr, "psnr_pooled": pooled, "mean": float(z.mean()), "std": float(z.std())}


def export(vae: AutoencoderKL, subjects: list[Subject], out: Path, device: str, rescale: bool) -> None:
    """Write the averaged weights as a diffusers folder in bf16, with the latents' scale and shift measured on data."""
    facts = evaluate(vae, subjects, device)
    if rescale:
        vae.register_to_config(scaling_factor=round(1 / facts["std"], 5), shift_factor=round(facts["mean"], 5))
    save_bf16(vae, out)
    tqdm.write(f"{out}: {facts}")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("models/emoji-mmdit/vae"))
    parser.add_argument("--init", type=Path, help="start from the weights of this folder")
    parser.add_argument("--decoder-only", action="store_true", help="sharper pictures from the same latents")
    parser.add_argument("--kl", type=float, default=1e-6)


def main() -> None:
    args = parse(__doc__, "vae", options, minutes=120, rate=1.8e-3, batch=12)
    subjects = load_subjects(args.cache, args.subjects)
    torch.manual_seed(0)
    vae = AutoencoderKL.from_pretrained(args.init, torch_dtype=torch.float32) if args.init else build()
    vae.to(args.device).encoder.requires_grad_(not args.decoder_only)
    training = Training(vae, args, decay=0.998, weight_decay=1e-4)

    def losses() -> list[partial[Tensor]]:
        parts = batch(training.rng, subjects, args.batch).to(args.device).chunk(args.threads)
        return [partial(loss_of, vae, part, args.kl) for part in parts]

    def publish() -> None:
        export(vae, subjects, args.out, args.device, rescale=not args.decoder_only)
        x = batch(np.random.default_rng(5), subjects, 12).to(args.device)
        save_grid(args.work / "grid.png", torch.cat([x, vae.decode(vae.encode(x).latent_dist.mean).sample]), 12)

    training.run(losses, publish)


if __name__ == "__main__":
    main()
