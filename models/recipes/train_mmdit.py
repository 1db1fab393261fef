"""Train the SD3-style MMDiT by rectified flow on the frozen VAE's latents and the frozen text encoders' embeddings.

Timesteps are logit-normal; each text encoder is absent at random, as zeros; some captions are the empty one. The image
stream may start from a trained DiT's (warm.py).
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from string import Template

import numpy as np
import torch
from common import save_grid, to_float
from data import Scene, Subject, caption, draw_scene, load_subjects, render
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.activations import GELU
from folder import export, write_subjects
from loop import Training, parse
from text import CLIP_WIDTHS, T5_WIDTH, Text
from torch import Tensor, nn
from tqdm import tqdm
from train_dit import build as build_dit
from warm import start_from

WIDTH, HEADS, LAYERS, PATCH, SHIFT = 224, 7, 4, 2, 1.0
ABSENT = (0.1, 0.1, 0.25)  # how often each text encoder is left out
CARD = Template("""\
id = "$name"
family = "sd3"
description = "A small SD3-style MMDiT that draws emoji at 64 px from short captions; trained by models/recipes"
source = { path = "." }
schedule = { kind = "flow", shift = $shift }
text = { clip = $clip, t5 = $t5 }
bucket = { passes = 8, encode = 8, decode = 8 }
defaults = { sampler = "flow_euler", num_inference_steps = 28, guidance_scale = 4.0, size = "64x64" }
limits = { num_inference_steps = 250, sizes = { min = 64, max = 64, multiple = 64 }, n = 16, prompt = 1000 }
license = "Apache-2.0; trained on Noto Emoji (Apache-2.0) and Twemoji (CC-BY 4.0)"
""")
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
            patch_size=PATCH,
            in_channels=16,
            out_channels=16,
            num_layers=LAYERS,
            num_attention_heads=HEADS,
            attention_head_dim=WIDTH // HEADS,
            caption_projection_dim=WIDTH,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=sum(CLIP_WIDTHS),
            pos_embed_max_size=8 // PATCH,
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


def write_card(out: Path, text: Text) -> None:
    """card.toml, with the lengths that the tokenizers name."""
    clip, _, t5 = (tokenizer.model_max_length for tokenizer in text.tokenizers)
    (out / "card.toml").write_text(CARD.substitute(name=out.name, shift=SHIFT, clip=clip, t5=t5))


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
    with torch.no_grad():
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


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--out", type=Path, default=Path("models/emoji-mmdit"), help="has the VAE and what train_text.py wrote"
    )
    parser.add_argument("--init", type=Path, help="start from the weights of this folder")
    parser.add_argument("--like", type=Path, help="start the image stream from the DiT of this folder")
    parser.add_argument("--empty", type=float, default=0.12, help="share of empty captions")
    parser.add_argument("--pool", type=int, default=6144, help="encoded pictures kept at a time")


def main() -> None:
    args = parse(__doc__, "mmdit", options, minutes=300, rate=1.2e-3)
    subjects = load_subjects(args.cache, args.subjects)
    write_subjects(args.out, subjects)
    torch.manual_seed(0)
    model, text = build(args.init), Text(args.out, args.out).requires_grad_(False)
    write_card(args.out, text)
    if args.like and not (args.work / "state.pt").exists():
        start_from(model, build_dit(len(subjects), args.like), text, subjects)
    vae = AutoencoderKL.from_pretrained(args.out / "vae", torch_dtype=torch.float32).to(args.device)
    train(args, model.to(args.device), text.to(args.device), vae.requires_grad_(False), subjects)


def train(args: argparse.Namespace, model: nn.Module, text: Text, vae: AutoencoderKL, subjects: list[Subject]) -> None:
    training = Training(model, args)
    pool = Latents(vae, subjects, args.pool, training.rng)

    def losses() -> list[partial[Tensor]]:
        if training.step % 8 == 7:
            pool.renew(64)
        parts = (pool.batch(training.share, args.empty) for _ in range(args.threads))
        return [partial(loss_of, model, text, *part) for part in parts]

    def publish() -> None:
        export(model, args.out, SHIFT)
        save_grid(args.work / f"grid-{training.step}.png", sample(model, text, vae, list(PROBES), guidance=4.0), 8)

    training.run(losses, publish)


if __name__ == "__main__":
    main()
