"""Train the class-conditional DiT: a class for each subject in each style, noise and variance predicted, linear betas.

A class says only its subject and style, and stands on white; the last is null.
Loss: the original's (Peebles and Xie 2022), mean squared error and the variational bound for the variance, weighted by
noise level. Every block has embedders of times and classes of its own, as diffusers' class has and the original has
not: six tables of classes remember more than one, in files that are as large.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from itertools import product
from pathlib import Path
from string import Template

import numpy as np
import torch
from bound import TIMES, Levels, bound, weight_of
from common import save_grid
from data import SIZE, STYLES, Subject, every_plain_scene, label, load_subjects
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from folder import save_bf16, write_subjects
from loop import Training, parse
from pool import SHAPE, encoder
from torch import Tensor, nn
from tqdm import tqdm

from app.families.dit import predict

WIDTH, HEADS, LAYERS, PATCH = 192, 6, 6, 2
CARD = Template("""\
id = "$name"
family = "dit"
description = "A small class-conditional DiT that draws emoji at 128 px by class; trained by models/recipes"
source = { path = "." }
components = { vae = "$vae" }
schedule = { kind = "diffusion", prediction = "epsilon", betas = "linear", variance = "learned_range" }
bucket = { passes = 8, encode = 8, decode = 8 }
defaults = { sampler = "ddim", num_inference_steps = 50, guidance_scale = 4.0, size = "${size}x$size" }
limits = { num_inference_steps = 250, sizes = { min = $size, max = $size, multiple = $size, square = true }, n = 16 }
license = "Apache-2.0; trained on Fluent Emoji (MIT) and Noto Emoji (Apache-2.0)"
""")


def build(classes: int, trained: Path | None = None) -> DiTTransformer2DModel:
    """The network, new or from a folder.

    NOTE: it stays in eval mode, because diffusers' embedders would drop labels by themselves: `loss_of` drops them.
    """
    if trained:
        model = DiTTransformer2DModel.from_pretrained(trained / "transformer", torch_dtype=torch.float32)
    else:
        model = DiTTransformer2DModel(
            sample_size=SHAPE[1],
            patch_size=PATCH,
            in_channels=SHAPE[0],
            out_channels=2 * SHAPE[0],
            num_layers=LAYERS,
            num_attention_heads=HEADS,
            attention_head_dim=WIDTH // HEADS,
            num_embeds_ada_norm=classes,
            activation_fn="gelu",
        )
        start(model)
    model.register_to_config(shared_embedders=False)  # which tells the server that the tables differ
    for block in model.transformer_blocks:  # softmax takes no notice of it: what moved it would be rounding alone
        block.attn1.to_k.bias.requires_grad_(False)
    return model.eval()


@torch.no_grad()
def start(model: nn.Module) -> None:
    """adaLN-zero: every block starts as the identity, the output as zero; classes start clearly apart."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith("norm1.linear") or name.startswith("proj_out"):
                nn.init.zeros_(module.weight)
        elif isinstance(module, LabelEmbedding):
            nn.init.normal_(module.embedding_table.weight, std=0.3)  # the original's 0.02 is fainter than the time


def classes(subjects: list[Subject]) -> list[str]:
    """The names of all classes: each subject in each style."""
    return [label(subject, style) for subject in subjects for style in range(len(STYLES))]


class Latents:
    """Every plain scene of every subject in every style, encoded once, and kept in a file of 380 MB for a restart."""

    def __init__(self, vae: AutoencoderKL, subjects: list[Subject], rng: np.random.Generator, file: Path) -> None:
        self.rng, self.weights, encode = rng, every_plain_scene(0)[1], encoder(vae, subjects)
        if not file.exists():
            wanted = list(product(range(len(subjects)), range(len(STYLES))))
            bar = tqdm(wanted, desc="encoding", mininterval=10)
            latents = torch.stack([torch.from_numpy(encode(every_plain_scene(*each)[0])) for each in bar])
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save(latents, file.with_suffix(".new"))
            file.with_suffix(".new").replace(file)
        self.latents = torch.load(file)

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """`count` latents, float [count, 16, 16, 16], and their labels, as `classes` counts them."""
        labels = torch.as_tensor(self.rng.integers(len(self.latents), size=count))
        which = torch.as_tensor(self.rng.choice(len(self.weights), size=count, p=self.weights))
        return self.latents[labels, which].float(), labels


def loss_of(
    model: DiTTransformer2DModel, levels: Levels, args: argparse.Namespace, clean: Tensor, labels: Tensor
) -> Tensor:
    t = torch.randint(TIMES, (len(clean),), device=clean.device)
    noise = torch.randn_like(clean)
    x = levels("alpha", t) * clean + levels("sigma", t) * noise
    dropped = torch.rand(len(labels), device=labels.device) < args.empty
    labels = torch.where(dropped, model.config.num_embeds_ada_norm, labels)
    found, v = predict(model, x, t, labels).chunk(2, dim=1)
    weight = weight_of(levels("snr", t), args.gamma, args.lift)
    return (weight * (found - noise).pow(2)).mean() + bound(levels, noise, found, v, t, x, clean).mean()


@torch.no_grad()
def sample(model: nn.Module, vae: AutoencoderKL, labels: list[int], guidance: float, steps: int = 25) -> Tensor:
    """Guided pictures, float [n, 3, 128, 128], for a look while training; all channels guided, as diffusers does."""
    scheduler = DDIMScheduler(TIMES, 1e-4, 2e-2, "linear", clip_sample=False)
    scheduler.set_timesteps(steps)
    null = model.config.num_embeds_ada_norm
    asked = torch.tensor(labels + [null] * len(labels), device=vae.device)
    x = torch.randn(len(labels), *SHAPE, generator=torch.Generator().manual_seed(0)).to(vae.device)
    for t in scheduler.timesteps:
        out = predict(model, torch.cat([x, x]), t.to(x.device).expand(len(asked)), asked)[:, : SHAPE[0]]
        own, empty = out.chunk(2)
        x = scheduler.step(empty + guidance * (own - empty), t, x, return_dict=False)[0]
    return vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample


def export(model: nn.Module, subjects: list[Subject], out: Path, vae: str) -> None:
    """The folder as diffusers' DiTPipeline has it, less the VAE, with the card that names whose VAE it is."""
    save_bf16(model, out / "transformer")
    DDIMScheduler(TIMES, 1e-4, 2e-2, "linear", clip_sample=False).save_pretrained(out / "scheduler")
    index = {"_class_name": "DiTPipeline", "_diffusers_version": "0.42.1"}
    index |= {"id2label": {str(i): name for i, name in enumerate(classes(subjects))}}
    index |= {"scheduler": ["diffusers", "DDIMScheduler"], "transformer": ["diffusers", "DiTTransformer2DModel"]}
    (out / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderKL"]}, indent=2) + "\n")
    write_subjects(out, subjects)
    (out / "card.toml").write_text(CARD.substitute(name=out.name, size=SIZE, vae=vae))


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--out", type=Path, default=Path("models/emoji-dit"))
    parser.add_argument("--vae", default="emoji-mmdit/vae", help="the shared VAE: another card's folder beside --out")
    parser.add_argument("--init", type=Path, help="start from the weights of this folder, of the same subjects")
    parser.add_argument("--empty", type=float, default=0.1, help="share of null labels")
    parser.add_argument("--gamma", type=float, default=1.0, help="signal-to-noise ratio above which loss counts less")
    parser.add_argument("--lift", type=float, default=40.0, help="most weight of the noisiest steps; 1 is min-SNR")


def main() -> None:
    args = parse(__doc__, "dit", options, minutes=300, rate=1.2e-3)
    subjects = load_subjects(args.cache, args.subjects)
    torch.manual_seed(0)
    count = len(classes(subjects))
    model = build(count, args.init).to(args.device)
    if model.config.num_embeds_ada_norm != count:
        raise SystemExit(f"{args.init} knows {model.config.num_embeds_ada_norm} classes, not {count}")
    vae = AutoencoderKL.from_pretrained(args.out.parent / args.vae, torch_dtype=torch.float32).to(args.device)
    train(args, model, vae.requires_grad_(False), subjects)


def train(args: argparse.Namespace, model: nn.Module, vae: AutoencoderKL, subjects: list[Subject]) -> None:
    training = Training(model, args)
    file = args.work / f"latents-{len(subjects)}.pt"
    pool, levels = Latents(vae, subjects, training.rng, file), Levels(args.device)
    quick = torch.compile(model, dynamic=False) if args.compile else model

    def losses() -> list[partial[Tensor]]:
        parts = (pool.batch(training.share) for _ in range(args.threads))
        return [partial(loss_of, quick, levels, args, *(each.to(args.device) for each in part)) for part in parts]

    def publish() -> None:
        export(model, subjects, args.out, args.vae)
        if args.compile:  # to draw here makes the next step compile anew, in two threads at once: a deadlock, once
            return
        pictures = sample(model, vae, list(range(model.config.num_embeds_ada_norm))[:16], 4.0)
        save_grid(args.work / f"grid-{training.step}.png", pictures, 8)

    training.run(losses, publish)


if __name__ == "__main__":
    main()
