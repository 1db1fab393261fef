"""The training loop of every recipe: gradients, averaged weights, a learning rate by the clock, checkpoints, curves.

A recipe gives it the losses of the next step, and what to publish.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from common import Average, Clock, Workers, load_state, plot_curve, save_state
from torch import Tensor, nn
from tqdm import tqdm


def parse(
    doc: str | None, work: str, extra: Callable[[argparse.ArgumentParser], None], **usual: object
) -> argparse.Namespace:
    """The command line: what all recipes take, with the `usual` values of this one, and its own options."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="where the emoji packages lie")
    parser.add_argument("--work", type=Path, default=Path("runs") / work, help="training state, curve, grids")
    parser.add_argument("--subjects", type=int, default=0, help="only the first N subjects; 0 is all")
    parser.add_argument("--minutes", type=float, help="planned training time")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--rate", type=float, help="the highest learning rate")
    parser.add_argument("--every", type=int, default=500, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=2, help="parts of a batch worked on at once; 1 on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), help="of matrix products; else what is quick here")
    parser.add_argument("--compile", action="store_true", help="a third faster after a minute of compiling")
    extra(parser)
    parser.set_defaults(**usual)
    args = parser.parse_args()
    args.dtype = args.dtype or ("bfloat16" if quick_bf16(args.device) else "float32")
    if args.device == "cpu" and args.dtype == "bfloat16":
        torch.backends.cuda.enable_flash_sdp(False)  # on a CPU its backward in bfloat16 took half of a DiT's step
    return args


def quick_bf16(device: str) -> bool:
    """Whether the device multiplies bfloat16 in hardware: with AMX 8 times, with AVX-512 3 times as fast."""
    return device != "cpu" or torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


class Training:
    """One network's training, from its start or from where `work` says that it stopped.

    `args` are those of `parse`. `step` is how many there were, `rng` a generator that a restart does not repeat.
    """

    def __init__(
        self, module: nn.Module, args: argparse.Namespace, decay: float = 0.999, weight_decay: float = 0.01
    ) -> None:
        self.module, self.args, self.average = module, args, Average(module, decay)
        weights = [p for p in module.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, betas=(0.9, 0.99), weight_decay=weight_decay, fused=True)
        self.step, self.curve, self.used = 0, [], 0.0
        if state := load_state(args.work / "state.pt"):
            module.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            self.average.values = {name: value.to(args.device) for name, value in state["average"].items()}
            self.step, self.curve, self.used = state["step"], state["losses"], state["used"]
        torch.manual_seed(self.step)
        self.rng = np.random.default_rng(self.step)

    @property
    def share(self) -> int:
        """Rows of a batch for each of the losses that are worked on at once."""
        return self.args.batch // self.args.threads

    @property
    def autocast(self) -> str | None:
        """The device's type where matrix products are in bfloat16."""
        return torch.device(self.args.device).type if self.args.dtype == "bfloat16" else None

    def run(self, losses: Callable[[], list[Callable[[], Tensor]]], publish: Callable[[], None]) -> None:
        """Train until the clock says so; `publish` is called with the averaged weights in place."""
        clock, workers = Clock(self.args.minutes, self.used), Workers(self.args.threads, self.autocast)
        if self.args.compile:  # in one thread first: two that compile at once have waited for each other for ever
            Workers(1, self.autocast).backward(self.module, losses()[:1])
            self.optimizer.zero_grad(set_to_none=True)
        recent, done, bar = [], False, tqdm(initial=self.step, mininterval=10)
        while not done:
            recent.append(self.advance(workers, losses(), clock.rate(self.args.rate)))
            bar.update()
            clock.tick()
            done = clock.share >= 1
            if self.step % 50 == 0:
                self.curve.append(float(np.mean(recent)))
                recent.clear()
                bar.set_description(f"loss {self.curve[-1]:.4f}", refresh=False)
            if self.step % self.args.every == 0 or done:
                self.used = clock.used
                self._checkpoint(publish)

    def advance(self, workers: Workers, losses: list[Callable[[], Tensor]], rate: float) -> float:
        """Take one step at this rate, and return the mean of the losses."""
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        loss = workers.backward(self.module, losses)
        torch.nn.utils.clip_grad_norm_(self.module.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        self.average.update(self.step)
        return loss

    @torch.no_grad()
    def _checkpoint(self, publish: Callable[[], None]) -> None:
        state = {"model": self.module.state_dict(), "optimizer": self.optimizer.state_dict()}
        state |= {"average": self.average.values, "step": self.step, "losses": self.curve, "used": self.used}
        save_state(self.args.work / "state.pt", **state)
        plot_curve(self.args.work / "loss.png", self.curve, "loss")
        self.average.swap()
        publish()
        self.average.swap()
        loss = f"{self.curve[-1]:.4f}" if self.curve else "not known yet"
        tqdm.write(f"step {self.step}, {self.used / 60:.0f} minutes, loss {loss}")
