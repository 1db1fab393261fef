"""The class-conditional DiT's noise levels and losses: linear betas, weights by noise level, the variational bound."""

from __future__ import annotations

import math

import torch
from torch import Tensor

TIMES = 1000


class Levels:
    """What the loss needs of the betas, by timestep (Ho et al. 2020, eq. 7; Nichol and Dhariwal 2021, eq. 15)."""

    def __init__(self, device: str) -> None:
        betas = torch.linspace(1e-4, 2e-2, TIMES, dtype=torch.float64)
        bar = torch.cumprod(1 - betas, 0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), bar[:-1]])
        posterior = betas * (1 - before) / (1 - bar)
        posterior[0] = posterior[1]  # as the original clips it: at the last step the variance would be 0
        columns = {
            "alpha": bar.sqrt(),
            "sigma": (1 - bar).sqrt(),
            "snr": bar / (1 - bar),
            "log_beta": betas.log(),
            "log_posterior": posterior.log(),
            "by_clean": betas * before.sqrt() / (1 - bar),
        }
        self.columns = {name: value.float().to(device)[:, None, None, None] for name, value in columns.items()}

    def __call__(self, name: str, t: Tensor) -> Tensor:
        """float [n, 1, 1, 1]"""
        return self.columns[name][t]


def weight_of(snr: Tensor, gamma: float, lift: float) -> Tensor:
    """Weight of the squared error of the noise, by signal-to-noise ratio.

    min(gamma / snr, 1) is min-SNR (Hang et al. 2023): fine detail does not outvote the rest. Up to `lift`, 1 / snr
    adds what min-SNR lacks: the subject is decided in the noisiest steps, where the squared error of the noise is snr
    times that of the clean latent, and so next to nothing (the flow models here learned subjects only once their
    times leaned to noise).
    """
    return (gamma / snr).clamp(max=1) * (1 / snr).clamp(1, lift)


def bound(levels: Levels, noise: Tensor, found: Tensor, v: Tensor, t: Tensor, x: Tensor, clean: Tensor) -> Tensor:
    """KL of the true step back from the model's, in bits a value, [n]; only `v`, the variance, gets a gradient.

    0.001 times the sum over 1,000 timesteps, as Nichol and Dhariwal weight it, is its mean: weight 1. NOTE: the
    original takes the likelihood of 8-bit pixels for the last step; latents are none, and KL serves there too.
    """
    guess = (x - levels("sigma", t) * found.detach()) / levels("alpha", t)
    frac = (v + 1) / 2
    log_model = frac * levels("log_beta", t) + (1 - frac) * levels("log_posterior", t)
    log_true = levels("log_posterior", t)
    gap = levels("by_clean", t) * (guess - clean)
    kl = 0.5 * (log_model - log_true + (log_true - log_model).exp() + gap.pow(2) * (-log_model).exp() - 1)
    return kl.mean(dim=(1, 2, 3)) / math.log(2)
