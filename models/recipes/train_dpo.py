"""Train a LoRA of the MMDiT by Diffusion-DPO (Wallace et al. 2023, arXiv:2311.12908) on the MMDiT's own pictures.

First the network draws several pictures of each caption, and the scores of `evaluate.py` say which of them are better;
that is kept on disk. Then low-rank matrices learn to bring the network nearer to the better picture of a pair, and away
from the worse one, than it was.
"""

from __future__ import annotations

import argparse
import zlib
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import product
from pathlib import Path

import numpy as np
import torch
from common import load_state, save_state
from data import Subject
from data64 import SIDES, SIZE, caption, draw_scene, load_subjects
from diffusers import AutoencoderKL, SD3Transformer2DModel
from distill_turbo import embed, follow, walk
from folder import read_subjects
from loop import Training, parse
from nearest import Nearest, twins
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from safetensors.torch import save_file
from scores import Asked, Score, judge
from text import Text
from torch import Tensor, nn
from torch.nn import functional as F
from tqdm import tqdm
from train_mmdit import build

from app.cards.cards import read_card

SHAPE = (16, SIZE // 8, SIZE // 8)
RANK = 8
ADAPTED = [f"attn.{name}" for name in ("to_q", "to_k", "to_v", "to_out.0")]
ADAPTED += [f"attn.{name}" for name in ("add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")]
ADAPTED += ["ff.net.0.proj", "ff.net.2", "ff_context.net.0.proj", "ff_context.net.2"]
TEXT = """\
description = "emoji-mmdit moved to the pictures that its recipe's scores prefer, by Diffusion-DPO"
trigger_words = []
"""


def apart(subject: Subject) -> bool:
    """True for the one subject in ten of which no pair is drawn, to see what the adapter does to others."""
    return zlib.crc32(f"dpo/{subject.key}".encode()) % 10 == 0


class Drawing:
    """The frozen network, its text encoders and VAE, and the judge of what they draw."""

    def __init__(self, args: argparse.Namespace, subjects: list[Subject]) -> None:
        self.args, self.subjects = args, subjects
        self.network = build(args.base).to(args.device).eval().requires_grad_(False)
        self.text = Text(args.base, args.base).to(args.device).eval().requires_grad_(False)
        vae = AutoencoderKL.from_pretrained(args.base / "vae", torch_dtype=torch.float32)
        self.vae = vae.to(args.device).eval().requires_grad_(False)
        self.nearest = Nearest(subjects, args.device, sides=tuple(s // 2 for each in SIDES.values() for s in each))
        self.same = twins(subjects)
        self.sigmas = walk(read_card(args.base / "card.toml").schedule, args.steps)

    @torch.no_grad()
    def write(self, file: Path, number: int, which: list[int]) -> None:
        """A caption of each of these subjects, pictures of `each` noises at every guidance, and their scores."""
        rng, each = np.random.default_rng([27, number]), self.args.each
        scenes = [draw_scene(rng, [self.subjects[at]]) for at in which]
        scenes = [replace(scene, subject=at) for at, scene in zip(which, scenes, strict=True)]
        asked = [Asked(s, caption(rng, s, self.subjects[s.subject]), number) for s in scenes for _ in range(each)]
        noise = torch.randn(len(asked), *SHAPE, generator=torch.Generator().manual_seed(number)).to(self.args.device)
        texts = [each.text for each in asked]
        both = embed(self.text, texts + [""] * len(texts), self.args.device)
        alone = (both[0][: len(texts)], both[1][: len(texts)])
        drawn = [follow(self.network, self.sigmas, noise, both if g > 1 else alone, g) for g in self.args.guidance]
        scores = [judge(self.nearest, self.same, asked, self.decode(latents)) for latents in drawn]
        kept = {f.name: [[getattr(s, f.name) for s in some] for some in scores] for f in fields(Score)}
        save_state(file, captions=texts[::each], latents=torch.stack(drawn).cpu().half(), scores=kept)

    def decode(self, latents: Tensor) -> np.ndarray:
        """Latents to pictures, uint8 [n, 64, 64, 3]."""
        pixels = self.vae.decode(latents / self.vae.config.scaling_factor + self.vae.config.shift_factor).sample
        return pixels.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).cpu().numpy()


def write_pictures(args: argparse.Namespace, subjects: list[Subject]) -> None:
    """One file for each batch of captions under `work`/pictures, made once: a restart goes on after the last one."""
    folder = args.work / "pictures"
    folder.mkdir(parents=True, exist_ok=True)
    places = [at for at, subject in enumerate(subjects) if not apart(subject)]
    order = np.concatenate([np.random.default_rng(turn).permutation(places) for turn in range(args.turns)])
    parts = [order[at : at + args.draw].tolist() for at in range(0, len(order), args.draw)]
    missing = [(folder / f"{n:05}.pt", n, part) for n, part in enumerate(parts)]
    missing = [job for job in missing if not job[0].exists()]
    if not missing:
        return
    drawing = Drawing(args, subjects)
    with ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        drawn = pool.map(lambda job: drawing.write(*job), missing)
        list(tqdm(drawn, total=len(missing), desc="pictures", mininterval=10))


@dataclass(frozen=True)
class Pairs:
    """Pictures and which of them are better: by caption, the places of (better, worse)."""

    latents: Tensor
    captions: list[str]
    better: list[list[tuple[int, int]]]

    def take(self, rng: np.random.Generator, which: np.ndarray) -> tuple[Tensor, list[str]]:
        """Latents, float [2n, 16, 8, 8], the better of these captions and then the worse, and the captions twice."""
        drawn = [self.better[at][rng.integers(len(self.better[at]))] for at in which]
        places = [pair[side] for side in (0, 1) for pair in drawn]
        return self.latents[places].float(), [self.captions[at] for at in which] * 2


def read_pairs(folder: Path, margin: float) -> tuple[Pairs, Pairs]:
    """All captions that have a pair: those to learn from, and one in ten to measure on."""
    files = [state for file in sorted(folder.glob("*.pt")) if (state := load_state(file))]
    latents, start = torch.cat([f["latents"].transpose(0, 1).flatten(0, 1) for f in files]), 0
    parts: tuple[list[tuple[str, list[tuple[int, int]]]], ...] = ([], [])
    for f in files:
        rows = zip(*(np.ravel(rows, order="F").tolist() for rows in f["scores"].values()), strict=True)
        scores = [Score(*row) for row in rows]
        each = len(scores) // len(f["captions"])
        for at, text in enumerate(f["captions"]):
            found = [(start + one, start + other) for one, other in rank(scores[at * each : (at + 1) * each], margin)]
            start += each
            if found:
                parts[zlib.crc32(text.encode()) % 10 == 0].append((text, found))
    learn, measure = (Pairs(latents, [c for c, _ in part], [p for _, p in part]) for part in parts)
    return learn, measure


def rank(scores: list[Score], margin: float) -> list[tuple[int, int]]:
    """(better, worse) of the pictures of one caption: the better is right, the worse is wrong or clearly softer."""
    right = [s.subject and s.background and s.spot is not False for s in scores]
    worth = [one + min(s.sharpness, 1.0) for one, s in zip(right, scores, strict=True)]
    places = range(len(scores))
    return [(a, b) for a, b in product(places, places) if right[a] and worth[a] - worth[b] >= margin]


def errors(network: nn.Module, x: Tensor, noise: Tensor, sigma: Tensor, text: tuple[Tensor, Tensor]) -> Tensor:
    """Mean squared error of the velocity at noise levels sigma [n] on straight paths from x to noise: [n]."""
    s = sigma[:, None, None, None]
    found = network((1 - s) * x + s * noise, *text, 1000 * sigma, return_dict=False)[0]
    return (found - (noise - x)).pow(2).mean(dim=(1, 2, 3))


def margins(
    network: nn.Module, frozen: nn.Module, x: Tensor, noise: Tensor, sigma: Tensor, text: tuple[Tensor, Tensor]
) -> Tensor:
    """How much more the network has gained over the frozen one on the better pictures than on the worse: [n].

    x holds the n better ones and then the worse; both of a pair get the same noise [n] and noise level [n].
    """
    noise, sigma = torch.cat([noise, noise]), torch.cat([sigma, sigma])
    with torch.no_grad():
        before = errors(frozen, x, noise, sigma, text)
    better, worse = (before - errors(network, x, noise, sigma, text)).chunk(2)
    return better - worse


def loss_of(
    args: argparse.Namespace, network: nn.Module, frozen: nn.Module, text: Text, x: Tensor, captions: list[str]
) -> Tensor:
    """The paper's equation 14, with the mean over a latent's values and without its T, which beta has in it."""
    count = len(x) // 2
    sigma = torch.sigmoid(args.times[0] + args.times[1] * torch.randn(count, device=x.device))
    gained = margins(network, frozen, x, torch.randn_like(x[:count]), sigma, embed(text, captions, x.device))
    return -F.logsigmoid(args.beta * gained).mean()


def adapt(network: SD3Transformer2DModel) -> SD3Transformer2DModel:
    """Low-rank matrices beside the linear layers of every block; nothing else is trained."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=ADAPTED)
    network.requires_grad_(False).add_adapter(config)
    return network


def export(network: SD3Transformer2DModel, out: Path) -> None:
    """The file as diffusers reads it, in float16, and the TOML beside it."""
    out.parent.mkdir(parents=True, exist_ok=True)
    state = get_peft_model_state_dict(network, adapter_name="default")
    save_file({f"transformer.{name}": value.detach().half().cpu().contiguous() for name, value in state.items()}, out)
    out.with_suffix(".toml").write_text(TEXT)


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--base", type=Path, default=Path("models/emoji-mmdit"))
    parser.add_argument("--out", type=Path, default=Path("models/loras/emoji-dpo.safetensors"))
    parser.add_argument("--turns", type=int, default=1, help="captions of each subject")
    parser.add_argument("--each", type=int, default=4, help="noises of each caption")
    parser.add_argument("--draw", type=int, default=16, help="captions drawn at once")
    parser.add_argument("--steps", type=int, default=14)
    parser.add_argument("--guidance", type=float, nargs="+", default=(4.0, 1.0), help="of pictures from each noise")
    parser.add_argument("--margin", type=float, default=0.08, help="of sharpness, between two right pictures of a pair")
    parser.add_argument("--beta", type=float, default=200.0, help="how much a gain counts: less strays farther")
    parser.add_argument("--times", type=float, nargs=2, default=(1.0, 1.2), help="mean and deviation of their logits")


def main() -> None:
    args = parse(__doc__, "dpo", options, minutes=4, rate=5e-4, batch=24)
    subjects = load_subjects(args.cache, args.subjects)
    subjects = subjects if args.subjects else read_subjects(args.base, subjects)
    write_pictures(args, subjects)
    torch.manual_seed(0)
    train(args)


def train(args: argparse.Namespace) -> None:
    learn, measure = read_pairs(args.work / "pictures", args.margin)
    print(f"{len(learn.captions)} captions with a pair to learn from, {len(measure.captions)} to measure on")
    frozen = build(args.base).to(args.device).eval().requires_grad_(False)
    text = Text(args.base, args.base).to(args.device).eval().requires_grad_(False)
    network = adapt(build(args.base)).to(args.device)
    training = Training(network, args, weight_decay=0.0)

    def part() -> partial[Tensor]:
        x, captions = learn.take(training.rng, training.rng.integers(len(learn.captions), size=training.share))
        return partial(loss_of, args, network, frozen, text, x.to(args.device), captions)

    def publish() -> None:
        export(network, args.out)
        if measure.captions:
            print(f"step {training.step}: {check(network, frozen, text, measure, args)}")

    training.run(lambda: [part() for _ in range(args.threads)], publish)


@torch.no_grad()
def check(network: nn.Module, frozen: nn.Module, text: Text, pairs: Pairs, args: argparse.Namespace) -> str:
    """On the pairs that are not learned from, always with the same noise: the loss, and where the better one gained."""
    generator, found = torch.Generator().manual_seed(0), []
    for which in np.array_split(np.arange(len(pairs.captions)), max(1, len(pairs.captions) // 32)):
        x, captions = pairs.take(np.random.default_rng(0), which)
        noise = torch.randn(len(which), *SHAPE, generator=generator)
        sigma = torch.sigmoid(args.times[0] + args.times[1] * torch.randn(len(which), generator=generator))
        both = embed(text, captions, args.device)
        found.append(margins(network, frozen, *(each.to(args.device) for each in (x, noise, sigma)), both))
    gained = torch.cat(found)
    loss = -F.logsigmoid(args.beta * gained).mean()
    return f"loss {loss:.4f}, the better gained more in {100 * (gained > 0).float().mean():.1f} % of {len(gained)}"


if __name__ == "__main__":
    main()
