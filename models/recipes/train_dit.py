"""Train the class-conditional DiT: one class a subject, noise and variance predicted, linear betas, a null class.

Knows nothing about captions or colours: a class says only its subject, which stands on white. Loss: the original's
(Peebles and Xie 2022), mean squared error and the variational bound for the variance, weighted by noise level. Every
block has embedders of times and classes of its own, as diffusers' class has and the original has not: six tables of
classes remember more than one, in files that are as large.
"""

from __future__ import annotations

import argparse
import json
from functools import partial
from pathlib import Path
from string import Template

import numpy as np
import torch
from bound import TIMES, Levels, bound, weight_of
from common import save_grid, to_float
from data import Subject, every_plain_scene, load_subjects, render
from diffusers import AutoencoderKL, DDIMScheduler, DiTTransformer2DModel
from diffusers.models.embeddings import LabelEmbedding
from folder import save_bf16, write_subjects
from loop import Training, parse
from torch import Tensor, nn
from tqdm import trange

from app.families.dit import predict

WIDTH, HEADS, LAYERS, PATCH = 224, 7, 6, 2
CARD = Template("""\
id = "$name"
family = "dit"
description = "A small class-conditional DiT that draws emoji at 64 px, one class a subject; trained by models/recipes"
source = { path = "." }
components = { vae = "$vae" }
schedule = { kind = "diffusion", prediction = "epsilon", betas = "linear", variance = "learned_range" }
bucket = { passes = 8, encode = 8, decode = 8 }
defaults = { sampler = "ddim", num_inference_steps = 50, guidance_scale = 4.0, size = "64x64" }
limits = { num_inference_steps = 250, sizes = { min = 64, max = 64, multiple = 64, square = true }, n = 16 }
license = "Apache-2.0; trained on Noto Emoji (Apache-2.0) and Twemoji (CC-BY 4.0)"
""")


def build(classes: int, trained: Path | None = None) -> DiTTransformer2DModel:
    """The network, new or from a folder.

    NOTE: it stays in eval mode, because diffusers' embedders would drop labels by themselves: `loss_of` drops them.
    """
    if trained:
        model = DiTTransformer2DModel.from_pretrained(trained / "transformer", torch_dtype=torch.float32)
    else:
        model = DiTTransformer2DModel(
            sample_size=8,
            patch_size=PATCH,
            in_channels=16,
            out_channels=32,
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


class Latents:
    """Every plain scene of every subject, encoded once."""

    def __init__(self, vae: AutoencoderKL, subjects: list[Subject], rng: np.random.Generator) -> None:
        self.rng, self.weights = rng, every_plain_scene(0)[1]
        encoded = [self._encode(vae, subjects, i) for i in trange(len(subjects), desc="encoding", mininterval=10)]
        self.mean, self.std = (torch.stack(parts) for parts in zip(*encoded, strict=True))

    @staticmethod
    @torch.no_grad()
    def _encode(vae: AutoencoderKL, subjects: list[Subject], index: int) -> tuple[Tensor, Tensor]:
        pictures = to_float([render(scene, subjects[index]) for scene in every_plain_scene(index)[0]])
        posterior = vae.encode(pictures.to(vae.device)).latent_dist
        scale, shift = vae.config.scaling_factor, vae.config.shift_factor
        return (posterior.mean - shift) * scale, posterior.std * scale

    def batch(self, count: int) -> tuple[Tensor, Tensor]:
        """Fresh samples of `count` latents and their labels."""
        labels = torch.as_tensor(self.rng.integers(len(self.mean), size=count))
        which = torch.as_tensor(self.rng.choice(len(self.weights), size=count, p=self.weights))
        mean, std = self.mean[labels, which], self.std[labels, which]
        return mean + std * torch.randn_like(mean), labels.to(mean.device)


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
    """Guided pictures, float [n, 3, 64, 64], for a look while training; all channels guided, as diffusers does."""
    scheduler = DDIMScheduler(TIMES, 1e-4, 2e-2, "linear", clip_sample=False)
    scheduler.set_timesteps(steps)
    null = model.config.num_embeds_ada_norm
    asked = torch.tensor(labels + [null] * len(labels), device=vae.device)
    x = torch.randn(len(labels), 16, 8, 8, generator=torch.Generator().manual_seed(0)).to(vae.device)
    for t in scheduler.timesteps:
        out = predict(model, torch.cat([x, x]), t.to(x.device).expand(len(asked)), asked)[:, :16]
        own, empty = out.chunk(2)
        x = scheduler.step(empty + guidance * (own - empty), t, x, return_dict=False)[0]
    return vae.decode(x / vae.config.scaling_factor + vae.config.shift_factor).sample


def export(model: nn.Module, subjects: list[Subject], out: Path, vae: str) -> None:
    """The folder as diffusers' DiTPipeline has it, less the VAE, with the card that names whose VAE it is."""
    save_bf16(model, out / "transformer")
    DDIMScheduler(TIMES, 1e-4, 2e-2, "linear", clip_sample=False).save_pretrained(out / "scheduler")
    index = {"_class_name": "DiTPipeline", "_diffusers_version": "0.42.1"}
    index |= {"id2label": {str(i): s.name for i, s in enumerate(subjects)}}
    index |= {"scheduler": ["diffusers", "DDIMScheduler"], "transformer": ["diffusers", "DiTTransformer2DModel"]}
    (out / "model_index.json").write_text(json.dumps(index | {"vae": ["diffusers", "AutoencoderKL"]}, indent=2) + "\n")
    write_subjects(out, subjects)
    (out / "card.toml").write_text(CARD.substitute(name=out.name, vae=vae))


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
    model = build(len(subjects), args.init).to(args.device)
    if model.config.num_embeds_ada_norm != len(subjects):
        raise SystemExit(f"{args.init} knows {model.config.num_embeds_ada_norm} classes, not {len(subjects)}")
    vae = AutoencoderKL.from_pretrained(args.out.parent / args.vae, torch_dtype=torch.float32).to(args.device)
    train(args, model, vae.requires_grad_(False), subjects)


def train(args: argparse.Namespace, model: nn.Module, vae: AutoencoderKL, subjects: list[Subject]) -> None:
    training = Training(model, args)
    pool, levels = Latents(vae, subjects, training.rng), Levels(args.device)
    quick = torch.compile(model, dynamic=False) if args.compile else model

    def losses() -> list[partial[Tensor]]:
        parts = (pool.batch(training.share) for _ in range(args.threads))
        return [partial(loss_of, quick, levels, args, *part) for part in parts]

    def publish() -> None:
        export(model, subjects, args.out, args.vae)
        pictures = sample(model, vae, list(range(len(subjects)))[:16], 4.0)
        save_grid(args.work / f"grid-{training.step}.png", pictures, 8)

    training.run(losses, publish)


if __name__ == "__main__":
    main()
