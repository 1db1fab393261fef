"""What the training loop is made of: a clock that plans the learning rate, weight averages, saved state, curves."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

matplotlib.use("Agg")
import matplotlib.pyplot as plt


class Clock:
    """Training time used so far, across restarts, as a share of the minutes that were planned.

    It goes on by `tick`, after each step. A step counts for `LONGEST` seconds at most, so the time that a process is
    stopped for (`kill -STOP`) is not training time.
    """

    LONGEST = 60.0

    def __init__(self, minutes: float, used: float = 0.0) -> None:
        self.planned, self.used, self.last = minutes * 60, used, time.monotonic()

    def tick(self) -> None:
        now = time.monotonic()
        self.used, self.last = self.used + min(now - self.last, self.LONGEST), now

    @property
    def share(self) -> float:
        return min(1.0, self.used / self.planned)

    def rate(self, peak: float, warmup: float = 0.02) -> float:
        """Learning rate now: a linear rise over the first `warmup` of the time, then half a cosine to 1 % of `peak`."""
        if self.share < warmup:
            return peak * (0.02 + self.share / warmup)
        rest = (self.share - warmup) / (1 - warmup)
        return peak * (0.01 + 0.99 * 0.5 * (1 + math.cos(math.pi * rest)))


class Average:
    """Exponential moving average of a module's weights, with a shorter memory at the start."""

    def __init__(self, module: nn.Module, decay: float = 0.999) -> None:
        self.decay = decay
        self.source = dict(module.named_parameters())
        self.values = {name: p.detach().clone() for name, p in self.source.items()}

    @torch.no_grad()
    def update(self, step: int) -> None:
        decay = min(self.decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.values.values()), list(self.source.values()), 1 - decay)

    @torch.no_grad()
    def swap(self) -> None:
        """Exchange the averaged and the live weights; call it twice to come back."""
        for name, p in self.source.items():
            kept = p.detach().clone()
            p.copy_(self.values[name])
            self.values[name].copy_(kept)


class Workers:
    """Gradients of a mean loss over parts of a batch, one thread a part.

    Threads inside each operation wait for each other at every one: 0.69 s a step of the VAE where this takes 0.54.
    `autocast`, where given, is the device type whose matrix products are in bfloat16.
    """

    def __init__(self, threads: int, autocast: str | None = None) -> None:
        self.threads, self.autocast = threads, autocast
        self.pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
        torch.set_num_threads(1)

    def backward(self, module: nn.Module, losses: list[Callable[[], Tensor]]) -> float:
        """Set every parameter's gradient to the mean over `losses`; returns the mean loss."""
        parameters = [p for p in module.parameters() if p.requires_grad]

        def one(loss: Callable[[], Tensor]) -> tuple[float, tuple[Tensor | None, ...]]:
            with torch.autocast(self.autocast or "cpu", torch.bfloat16, enabled=self.autocast is not None):
                value = loss() / len(losses)
            return value.item(), torch.autograd.grad(value, parameters, allow_unused=True)

        values, gradients = zip(*self.pool.map(one, losses), strict=True)
        for p, *parts in zip(parameters, *gradients, strict=True):
            present = [part for part in parts if part is not None]
            # NOTE: the fused AdamW reads a gradient in the order of its weight, whatever the strides
            p.grad = sum(present[1:], start=present[0]).contiguous() if present else None
        return sum(values)


def save_state(path: Path, **state: Any) -> None:
    """Write the training state whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(state, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_state(path: Path) -> dict[str, Any] | None:
    return torch.load(path, weights_only=True, map_location="cpu") if path.exists() else None


def plot_curve(path: Path, losses: list[float], label: str) -> None:
    """A loss curve, one point for each recorded mean, as PNG."""
    plt.figure(figsize=(6, 3))
    plt.plot(losses)
    plt.yscale("log")
    plt.ylabel(label)
    plt.tight_layout()
    plt.savefig(path, dpi=80)
    plt.close()


def to_float(pictures: np.ndarray | list[np.ndarray]) -> Tensor:
    """uint8 [n, h, w, 3] -> float [n, 3, h, w] in -1 to 1."""
    return torch.from_numpy(np.asarray(pictures)).permute(0, 3, 1, 2).float().div(127.5).sub(1)


def save_grid(path: Path, pictures: Tensor, columns: int) -> None:
    """float [n, 3, h, w] in -1 to 1 -> one PNG of rows of `columns` pictures."""
    tiles = pictures.float().add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()
    rows = [np.concatenate(list(tiles[i : i + columns]), axis=1) for i in range(0, len(tiles), columns)]
    Image.fromarray(np.concatenate([row for row in rows if row.shape == rows[0].shape], axis=0)).save(path)
