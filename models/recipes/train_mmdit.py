"""Train the SD3-style MMDiT by rectified flow on the latents of the VAE; that and the text encoders are frozen.

Timesteps are logit-normal; each text encoder is absent at random, as zeros; some captions are empty. With `--pooled` it
learns the pictures from the summaries of captions alone, one token where there are 30: the first half of the training.
"""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from string import Template

import numpy as np
import torch
from common import save_grid
from data import SIZE, Subject, caption, draw_scene, load_subjects
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.activations import GELU
from folder import export, write_subjects
from loop import Training, parse
from pool import SHAPE, Pool, fill
from text import CLIP_WIDTHS, T5_WIDTH, Text
from torch import Tensor, nn

WIDTH, HEADS, LAYERS, PATCH, SHIFT = 192, 4, 5, 2, 2.0
TIMES = (1.5, 1.2)  # mean and deviation of the times' logits
ABSENT = (0.04, 0.04, 0.15)  # how often each text encoder is left out
CARD = Template("""\
id = "$name"
family = "sd3"
description = "A small SD3-style MMDiT that draws emoji at 128 px from short captions; trained by models/recipes"
source = { path = "." }
schedule = { kind = "flow", shift = $shift }
text = { clip = $clip, t5 = $t5 }
bucket = { passes = 8, encode = 8, decode = 8 }
defaults = { sampler = "flow_euler", num_inference_steps = 28, guidance_scale = 4.0, size = "${size}x$size" }
limits = { num_inference_steps = 250, sizes = { min = $size, max = $size, multiple = $size }, n = 16, prompt = 1000 }
license = "Apache-2.0; trained on Fluent Emoji (MIT) and Noto Emoji (Apache-2.0)"
""")
PROBES = (
    "red apple on a blue background", "a cat", "a flat dog on a green background", "pizza on yellow", "car",
    "a rocket on a black background", "flat tree", "a small sun at the top on a blue background", "house",
    "flat heart", "a small banana at the left", "penguin on a pink background", "on purple, a ghost", "an otter",
    "flat guitar on gray", "a small robot at the right on a white background",
)  # fmt: skip


def build(trained: Path | None = None, patch: int = PATCH) -> SD3Transformer2DModel:
    """The network, new or from a folder; while it trains, its GELU is the exact one.

    NOTE: diffusers' class uses the tanh form, which differs by at most 5e-4 and takes twice as long on a CPU.
    """
    if trained:
        model = SD3Transformer2DModel.from_pretrained(trained / "transformer", torch_dtype=torch.float32)
    else:
        model = SD3Transformer2DModel(
            sample_size=SHAPE[1],
            patch_size=patch,
            in_channels=SHAPE[0],
            out_channels=SHAPE[0],
            num_layers=LAYERS,
            num_attention_heads=HEADS,
            attention_head_dim=WIDTH // HEADS,
            caption_projection_dim=WIDTH,
            joint_attention_dim=T5_WIDTH,
            pooled_projection_dim=sum(CLIP_WIDTHS),
            pos_embed_max_size=SHAPE[1] // patch,
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


@torch.no_grad()
def spread(linear: nn.Linear, given: Tensor) -> None:
    """Start a layer with every direction of `given`, [n, width], equally wide, however narrow it was.

    Captions differ in colour and place far more than in subject: as they come, what a fresh layer and the one after it
    made of 1,169 names had a cosine of 0.79 between neighbours.
    """
    mean, (values, vectors) = given.mean(0), torch.linalg.eigh(given.T.cov())
    scaled = vectors / (values + 1e-3 * values.mean()).sqrt()
    weight = torch.randn(linear.out_features, len(values)) @ scaled.T / len(values) ** 0.5
    linear.weight.copy_(weight)
    linear.bias.copy_(-weight @ mean)


@torch.no_grad()
def summaries(text: Text, subjects: list[Subject], each: int = 8) -> Tensor:
    """float [each x subjects, width]: pooled captions."""
    rng = np.random.default_rng(0)
    scenes = [draw_scene(rng, subjects) for _ in range(each * len(subjects))]
    captions = [caption(rng, scene, subjects[scene.subject]) for scene in scenes]
    parts = (captions[at : at + 256] for at in range(0, len(captions), 256))
    return torch.cat([text(part, torch.ones(len(part), 3))[1] for part in parts])


def write_card(out: Path, text: Text) -> None:
    """card.toml, with the lengths that the tokenizers name."""
    clip, _, t5 = (tokenizer.model_max_length for tokenizer in text.tokenizers)
    (out / "card.toml").write_text(CARD.substitute(name=out.name, size=SIZE, shift=SHIFT, clip=clip, t5=t5))


def kept_encoders(count: int, device: torch.device) -> Tensor:
    """float [count, 3], 0 where an encoder is absent; at least one is always there."""
    kept = (torch.rand(count, 3, device=device) >= torch.tensor(ABSENT, device=device)).float()
    kept[:, 0] = torch.where(kept.sum(1) == 0, 1.0, kept[:, 0])
    return kept


def loss_of(
    model: SD3Transformer2DModel, text: Text, x: Tensor, captions: list[str], pooled_alone: bool = False
) -> Tensor:
    """Rectified flow: the velocity from data to noise at a logit-normal time (Esser et al. 2024, section 3.1).

    The times lean to noise: what the picture shows is settled above 0.8, where a centred draw hardly ever comes. They
    lean more than at 64 pixels, because four times the pixels outweigh more noise (the same, section 5.3.2).
    """
    with torch.no_grad():
        embeddings, pooled = text(captions, kept_encoders(len(x), x.device))
    embeddings = embeddings[:, :1] * 0 if pooled_alone else embeddings
    noise = torch.randn_like(x)
    time = torch.sigmoid(TIMES[0] + TIMES[1] * torch.randn(len(x), device=x.device))
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
    model: SD3Transformer2DModel,
    text: Text,
    vae: AutoencoderKL,
    captions: list[str],
    guidance: float,
    steps: int = 28,
    pooled_alone: bool = False,
) -> Tensor:
    """Guided pictures, float [n, 3, 128, 128]: the loop of the diffusers pipeline, for a look while training."""
    scheduler = FlowMatchEulerDiscreteScheduler(shift=SHIFT)
    scheduler.set_timesteps(steps, device=vae.device)
    present = torch.ones(2 * len(captions), 3, device=vae.device)
    embeddings, pooled = text(captions + [""] * len(captions), present)
    embeddings = embeddings[:, :1] * 0 if pooled_alone else embeddings
    generator = torch.Generator("cpu").manual_seed(0)
    x = torch.randn(len(captions), *SHAPE, generator=generator).to(vae.device)
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
    parser.add_argument("--pooled", action="store_true", help="captions' summaries alone, no tokens: a third faster")
    parser.add_argument("--empty", type=float, default=0.1, help="share of empty captions")
    parser.add_argument("--pool", type=Path, default=Path("runs/pool"), help="folder of encoded scenes")
    parser.add_argument("--scenes", type=int, default=49152, help="scenes to encode where --pool is empty")
    parser.add_argument("--patch", type=int, default=PATCH, help="side of a token in latent pixels")


def main() -> None:
    args = parse(__doc__, "mmdit", options, minutes=300, rate=1.2e-3)
    subjects = load_subjects(args.cache, args.subjects)
    write_subjects(args.out, subjects)
    torch.manual_seed(0)
    text = Text(args.out, args.out).eval().requires_grad_(False)
    write_card(args.out, text)
    vae = AutoencoderKL.from_pretrained(args.out / "vae", torch_dtype=torch.float32).to(args.device)
    fill(args.pool, vae.requires_grad_(False), subjects, args.scenes, args.threads)
    model = build(args.init, args.patch)
    if not args.init:
        spread(model.time_text_embed.text_embedder.linear_1, summaries(text, subjects))
    train(args, model.to(args.device), text.to(args.device), vae, subjects)


def train(
    args: argparse.Namespace, model: SD3Transformer2DModel, text: Text, vae: AutoencoderKL, subjects: list[Subject]
) -> None:
    training = Training(model, args)
    pool = Pool(args.pool, subjects, training.rng, args.device)
    quick = torch.compile(model, dynamic=False) if args.compile else model

    def losses() -> list[partial[Tensor]]:
        parts = (pool.batch(training.share, args.empty) for _ in range(args.threads))
        return [partial(loss_of, quick, text, *part, args.pooled) for part in parts]

    def publish() -> None:
        export(model, args.out, SHIFT)
        if args.compile:  # to draw here makes the next step compile anew, in two threads at once: a deadlock, once
            return
        with torch.autocast(training.autocast or "cpu", torch.bfloat16, enabled=training.autocast is not None):
            pictures = sample(model, text, vae, list(PROBES), guidance=4.0, steps=14, pooled_alone=args.pooled)
        save_grid(args.work / f"grid-{training.step}.png", pictures, 8)

    training.run(losses, publish)


if __name__ == "__main__":
    main()
