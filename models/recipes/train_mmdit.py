"""Train the SD3-style MMDiT and its three text encoders together, by rectified flow on the frozen VAE's latents.

Timesteps are logit-normal; each text encoder is absent at random, as zeros; some captions are the empty one.
"""

from __future__ import annotations

import argparse
from datetime import UTC, datetime, timedelta
from functools import partial
from pathlib import Path

import numpy as np
import torch
from common import Average, Clock, Workers, load_state, plot_curve, save_grid, save_state, to_float
from data import Scene, Subject, caption, draw_scene, load_subjects, render
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.activations import GELU
from folder import export
from text import CLIP_WIDTHS, T5_WIDTH, Text, train_tokenizers
from torch import Tensor, nn
from tqdm import tqdm

WIDTH, HEADS, LAYERS, SHIFT = 192, 6, 5, 1.0
ABSENT = (0.1, 0.1, 0.25)  # how often each text encoder is left out
PROBES = (
    "red apple on a blue background", "a cat", "dog face on a green background", "slice of pizza on yellow", "car",
    "a rocket on a black background", "tree", "a small sun at the top on a blue background", "house", "red heart",
    "a small banana at the left", "penguin on a pink background", "on purple, a ghost", "green apple", "guitar on gray",
    "a small red apple at the right on a white background",
)  # fmt: skip


def build(trained: Path | None = None) -> SD3Transformer2DModel:
    """The network, new or from a folder; while it trains, its GELU is the exact one.

    NOTE: diffusers' class uses the tanh form, which differs by at most 5e-4 and takes twice as long on a CPU.
    """
    if trained:
        model = SD3Transformer2DModel.from_pretrained(trained / "transformer", torch_dtype=torch.float32)
    else:
        model = SD3Transformer2DModel(
            sample_size=8,
            patch_size=1,
            in_channels=16,
            out_channels=16,
            num_layers=LAYERS,
            num_attention_heads=HEADS,
            attention_head_dim=WIDTH // HEADS,
            caption_projection_dim=WIDTH,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=sum(CLIP_WIDTHS),
            pos_embed_max_size=16,
            qk_norm="rms_norm",
        )
        start(model)
    for module in model.modules():
        if isinstance(module, GELU):
            module.approximate = "none"
    return model.train()


@torch.no_grad()
def start(model: SD3Transformer2DModel) -> None:
    """adaLN-zero (Peebles and Xie 2022): every block starts as the identity, and the output as zero."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if "norm" in name or name == "proj_out":
                nn.init.zeros_(module.weight)


class Latents:
    """A pool of encoded scenes, renewed a little at a time, so that encoding costs little and nothing grows stale."""

    def __init__(self, vae: AutoencoderKL, subjects: list[Subject], size: int, rng: np.random.Generator) -> None:
        self.vae, self.subjects, self.rng, self.next = vae, subjects, rng, 0
        self.scenes: list[Scene] = []
        device = vae.device
        self.mean = torch.empty(size, 16, 8, 8, device=device)
        self.std = torch.empty_like(self.mean)
        for _ in tqdm(range(0, size, 64), desc="encoding", mininterval=10):
            self.renew(64)

    @torch.no_grad()
    def renew(self, count: int) -> None:
        """Put `count` new scenes in the place of the oldest ones."""
        scenes = [draw_scene(self.rng, self.subjects) for _ in range(count)]
        pictures = to_float([render(s, self.subjects[s.subject]) for s in scenes]).to(self.mean.device)
        posterior = self.vae.encode(pictures).latent_dist
        scale, shift = self.vae.config.scaling_factor, self.vae.config.shift_factor
        self.scenes[self.next : self.next + count] = scenes
        self.mean[self.next : self.next + count] = (posterior.mean - shift) * scale
        self.std[self.next : self.next + count] = posterior.std * scale
        self.next = (self.next + count) % len(self.mean)

    def batch(self, count: int, empty: float) -> tuple[Tensor, list[str]]:
        """Fresh samples of `count` latents and captions written anew, each "" with probability `empty`."""
        index = self.rng.integers(len(self.mean), size=count)
        scenes = [self.scenes[i] for i in index]
        captions = [caption(self.rng, s, self.subjects[s.subject]) for s in scenes]
        captions = ["" if self.rng.random() < empty else text for text in captions]
        where = torch.as_tensor(index, device=self.mean.device)
        return self.mean[where] + self.std[where] * torch.randn_like(self.mean[where]), captions


def kept_encoders(count: int, device: torch.device) -> Tensor:
    """float [count, 3], 0 where an encoder is absent; at least one is always there."""
    kept = (torch.rand(count, 3, device=device) >= torch.tensor(ABSENT, device=device)).float()
    kept[:, 0] = torch.where(kept.sum(1) == 0, 1.0, kept[:, 0])
    return kept


def loss_of(model: SD3Transformer2DModel, text: Text, x: Tensor, captions: list[str]) -> Tensor:
    """Rectified flow: the velocity from data to noise at a logit-normal time (Esser et al. 2024, section 3.1).

    The times lean to noise: what the picture shows is settled above 0.8, where a centred draw hardly ever comes.
    """
    embeddings, pooled = text(captions, kept_encoders(len(x), x.device))
    noise = torch.randn_like(x)
    time = torch.sigmoid(1.0 + 1.2 * torch.randn(len(x), device=x.device))
    s = time[:, None, None, None]
    out = model(
        (1 - s) * x + s * noise,
        encoder_hidden_states=embeddings,
        pooled_projections=pooled,
        timestep=time * 1000,
        return_dict=False,
    )[0]
    return (out - (noise - x)).pow(2).mean()


@torch.no_grad()
def sample(
    model: SD3Transformer2DModel, text: Text, vae: AutoencoderKL, captions: list[str], guidance: float, steps: int = 28
) -> Tensor:
    """Guided pictures, float [n, 3, 64, 64]: the loop of the diffusers pipeline, for a look while training."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(steps, device=vae.device)
    present = torch.ones(2 * len(captions), 3, device=vae.device)
    embeddings, pooled = text(captions + [""] * len(captions), present)
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(len(captions), 16, 8, 8, generator=generator).to(vae.device)
    for t in scheduler.timesteps:
        both = torch.cat([x, x])
        out = model(both, embeddings, pooled, t.expand(len(both)), return_dict=False)[0]
        asked, empty = out.chunk(2)
        x = scheduler.step(empty + guidance * (asked - empty), t, x, return_dict=False)[0]
    return vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="where the emoji packages lie")
    parser.add_argument("--work", type=Path, default=Path("runs/mmdit"), help="training state, curve, grids")
    parser.add_argument("--out", type=Path, default=Path("models/emoji-mmdit"), help="has vae/; the rest is written")
    parser.add_argument("--init", type=Path, help="start from the weights of this folder")
    parser.add_argument("--subjects", type=int, default=0, help="only the first N subjects; 0 is all")
    parser.add_argument("--minutes", type=float, default=95, help="planned training time")
    parser.add_argument("--until", help="HH:MM in UTC; replaces --minutes")
    parser.add_argument("--batch", type=int, default=48)
    parser.add_argument("--rate", type=float, default=1.5e-3)
    parser.add_argument("--empty", type=float, default=0.12, help="share of empty captions")
    parser.add_argument("--pool", type=int, default=4096, help="encoded pictures kept at a time")
    parser.add_argument("--every", type=int, default=400, help="steps between checkpoints")
    parser.add_argument("--threads", type=int, default=2, help="parts of a batch worked on at once; 1 on a GPU")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def planned_minutes(args: argparse.Namespace, used: float) -> float:
    if not args.until:
        return float(args.minutes)
    now = datetime.now(UTC)
    hour, minute = map(int, args.until.split(":"))
    end = now.replace(hour=hour, minute=minute, second=0)
    return used / 60 + ((end if end > now else end + timedelta(days=1)) - now).total_seconds() / 60


def main() -> None:
    args = arguments()
    args.work.mkdir(parents=True, exist_ok=True)
    everything = load_subjects(args.cache)
    train_tokenizers(everything, args.out)
    subjects = everything[: args.subjects or None]
    (args.work / "subjects.txt").write_text("\n".join(s.name for s in subjects) + "\n")
    torch.manual_seed(0)
    both = nn.ModuleDict({"model": build(args.init), "text": Text(args.out, args.init)}).to(args.device)
    vae = AutoencoderKL.from_pretrained(args.out / "vae", torch_dtype=torch.float32).to(args.device)
    train(args, both, vae.requires_grad_(False), subjects)


def train(args: argparse.Namespace, both: nn.ModuleDict, vae: AutoencoderKL, subjects: list[Subject]) -> None:
    average = Average(both, 0.999)
    optimizer = torch.optim.AdamW(both.parameters(), betas=(0.9, 0.99), weight_decay=0.01, foreach=True)
    step, losses, used, recent = 0, [], 0.0, []
    if state := load_state(args.work / "state.pt"):
        both.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        average.values = {name: value.to(args.device) for name, value in state["average"].items()}
        step, losses, used = state["step"], state["losses"], state["used"]
    pool = Latents(vae, subjects, args.pool, np.random.default_rng(step))
    clock = Clock(planned_minutes(args, used), used)
    workers, bar = Workers(args.threads), tqdm(initial=step, mininterval=10)
    while clock.share < 1:
        for group in optimizer.param_groups:
            group["lr"] = clock.rate(args.rate)
        parts = [pool.batch(args.batch // args.threads, args.empty) for _ in range(args.threads)]
        loss = workers.backward(both, [partial(loss_of, both["model"], both["text"], *part) for part in parts])
        torch.nn.utils.clip_grad_norm_(both.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        average.update(step)
        recent.append(loss)
        bar.update()
        if step % 8 == 0:
            pool.renew(64)
        if step % 50 == 0:
            losses.append(float(np.mean(recent)))
            recent = []
            bar.set_description(f"loss {losses[-1]:.4f}", refresh=False)
        if step % args.every == 0 or clock.share >= 1:
            state = {"model": both.state_dict(), "optimizer": optimizer.state_dict(), "average": average.values}
            save_state(args.work / "state.pt", **state, step=step, losses=losses, used=clock.used)
            publish(args, both, vae, average, losses, f"step {step} {clock.used:.0f} s")


def publish(args, both, vae, average, losses, note: str) -> None:  # type: ignore[no-untyped-def]
    """The averaged weights as a card's files, the loss curve, and a grid of pictures."""
    plot_curve(args.work / "loss.png", losses, "loss")
    average.swap()
    export(both["model"], both["text"].encoders, args.out, SHIFT)
    pictures = sample(both["model"], both["text"], vae, list(PROBES), guidance=4.0)
    save_grid(args.work / f"grid-{note.split()[1]}.png", pictures, 8)
    average.swap()
    tqdm.write(f"{note} loss {losses[-1] if losses else float('nan'):.4f}")


if __name__ == "__main__":
    main()
