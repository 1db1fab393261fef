"""Distil the turbo: reflow (Liu et al. 2022) on pairs of noise and what the guided teacher makes of it.

The teacher is the only source. First the pairs are drawn and kept on disk, then the
student, which starts as the teacher, learns the straight path between the two ends of each pair, unguided, at the times
where its card's schedule will ask it in 1 to 4 steps. Text encoders and VAE stay the teacher's, named by the card.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from pathlib import Path
from string import Template

import numpy as np
import torch
from common import load_state, save_grid, save_state
from data import SIZE, Subject, caption, draw_scene, load_subjects
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from folder import read_subjects, save_bf16, write_subjects
from loop import Training, parse
from pool import SHAPE
from text import Text
from torch import Tensor, nn
from tqdm import tqdm
from train_mmdit import PROBES, build

from app.cards.cards import read_card
from app.samplers.schedule import Schedule
from app.samplers.table import compile_table

SHARED = ("vae", "text_encoder", "text_encoder_2", "text_encoder_3", "tokenizer", "tokenizer_2", "tokenizer_3")
STEPS = (1, 2, 3, 4)
CARD = Template("""\
id = "$name"
family = "sd3"
description = "The emoji MMDiT in 1 to 4 steps without guidance, distilled from it by models/recipes"
source = { path = "." }
schedule = { kind = "flow", shift = $shift, spacing = "flux" }
text = { clip = $clip, t5 = $t5 }
bucket = { passes = 8, encode = 8, decode = 8 }
defaults = { sampler = "flow_euler", num_inference_steps = 4, guidance_scale = 0.0, size = "${size}x$size" }
limits = { num_inference_steps = 100, sizes = { min = $size, max = $size, multiple = $size }, n = 16, prompt = 1000 }
license = "Apache-2.0; trained on Fluent Emoji (MIT) and Noto Emoji (Apache-2.0)"

[components]
""")


@dataclass(frozen=True)
class Point:
    """Where the student stands on straight paths: its time, what it sees there, both ends, and what it answers."""

    sigma: Tensor
    x: Tensor
    noise: Tensor
    clean: Tensor
    found: Tensor

    @property
    def guess(self) -> Tensor:
        """The clean latent that the answer amounts to."""
        return self.x - self.sigma * self.found


def straight(point: Point) -> Tensor:
    """Reflow: the velocity of the straight line between the ends, noise - clean."""
    return (point.found - (point.noise - point.clean)).pow(2).mean()


TERMS: list[tuple[float, Callable[[Point], Tensor]]] = [(1.0, straight)]
"""The loss: weights and terms. An adversarial term (Sauer et al. 2023) is one more, on `guess` against `clean`, with a
step of its discriminator beside the optimizer's in `train`."""


def walk(schedule: Schedule, steps: int) -> list[float]:
    """The noise levels that this many steps visit, the final 0 included."""
    return [*(compile_table(schedule, "flow_euler", steps).t / schedule.train_steps), 0.0]


@torch.no_grad()
def follow(model: nn.Module, sigmas: list[float], x: Tensor, text: tuple[Tensor, Tensor], guidance: float) -> Tensor:
    """Euler steps from noise x; text holds the captions' embeddings, and then the empty one's where guided."""
    for here, there in pairwise(sigmas):
        both = torch.cat([x, x]) if guidance > 1 else x
        out = model(both, *text, torch.full((len(both),), 1000 * here, device=x.device), return_dict=False)[0]
        if guidance > 1:
            asked, empty = out.chunk(2)
            out = empty + guidance * (asked - empty)
        x = x + (there - here) * out
    return x


@torch.no_grad()
def embed(text: Text, captions: list[str], device: str | torch.device) -> tuple[Tensor, Tensor]:
    return text(captions, torch.ones(len(captions), 3, device=device))


def write_pairs(args: argparse.Namespace, teacher: nn.Module, text: Text, subjects: list[Subject]) -> None:
    """One file for each batch under `work`/pairs, made once: a restart goes on after the last one."""
    folder = args.work / "pairs"
    folder.mkdir(parents=True, exist_ok=True)
    files = [folder / f"{number:05}.pt" for number in range(-(-args.pairs // args.draw))]
    missing = [number for number, file in enumerate(files) if not file.exists()]
    quick = torch.compile(teacher, dynamic=False) if args.compile else teacher
    one = partial(write_batch, args, quick, text, subjects)
    for number in missing[:1]:  # alone, because it compiles
        one(files[number], number)
    with ThreadPoolExecutor(args.threads, initializer=torch.set_num_threads, initargs=(1,)) as pool:
        drawn = pool.map(lambda number: one(files[number], number), missing[1:])
        list(tqdm(drawn, total=len(missing[1:]), desc="pairs", mininterval=10))


@torch.no_grad()
def write_batch(
    args: argparse.Namespace, teacher: nn.Module, text: Text, subjects: list[Subject], file: Path, number: int
) -> None:
    """`draw` captions, noises and what the guided teacher makes of them."""
    rng = np.random.default_rng([7, number])
    scenes = [draw_scene(rng, subjects) for _ in range(args.draw)]
    captions = [caption(rng, s, subjects[s.subject]) for s in scenes]
    generator = torch.Generator().manual_seed(number)
    noise = torch.randn(args.draw, *SHAPE, generator=generator).half()  # kept so: the pair starts at just this
    sigmas = walk(read_card(args.teacher / "card.toml").schedule, args.steps)
    kind = torch.device(args.device).type
    with torch.autocast(kind, torch.bfloat16, enabled=args.dtype == "bfloat16"):
        both = embed(text, captions + [""] * args.draw, args.device)
        clean = follow(teacher, sigmas, noise.float().to(args.device), both, args.guidance)
    save_state(file, captions=captions, noise=noise, clean=clean.cpu().half())


def read_pairs(folder: Path) -> tuple[Tensor, Tensor, list[str]]:
    """All pairs: noise and clean float16 [n, 16, 16, 16], captions."""
    files = [state for file in sorted(folder.glob("*.pt")) if (state := load_state(file))]
    noise, clean = (torch.cat([f[end] for f in files]) for end in ("noise", "clean"))
    return noise, clean, [text for f in files for text in f["captions"]]


def draw_times(rng: np.random.Generator, schedule: Schedule, count: int, anywhere: float) -> np.ndarray:
    """Noise levels: of a random line of a random number of STEPS; a share of them anywhere, for other numbers."""
    grids = [walk(schedule, steps)[:-1] for steps in STEPS]
    lines = [float(rng.choice(grids[rng.integers(len(grids))])) for _ in range(count)]
    return np.where(rng.random(count) < anywhere, rng.random(count), lines).astype(np.float32)


def loss_of(model: nn.Module, text: Text, captions: list[str], noise: Tensor, clean: Tensor, times: Tensor) -> Tensor:
    sigma = times[:, None, None, None]
    x = (1 - sigma) * clean + sigma * noise
    point = Point(
        sigma, x, noise, clean, model(x, *embed(text, captions, x.device), 1000 * times, return_dict=False)[0]
    )
    return sum((weight * term(point) for weight, term in TERMS), start=torch.zeros((), device=x.device))


def export(model: nn.Module, subjects: list[Subject], args: argparse.Namespace) -> None:
    """The student's network and schedule; everything else is the teacher's, by the names in the card."""
    save_bf16(model, args.out / "transformer")
    FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=args.shift).save_pretrained(args.out / "scheduler")
    shutil.copy(args.teacher / "model_index.json", args.out)
    write_subjects(args.out, subjects)
    teacher = read_card(args.teacher / "card.toml")
    shared = {part: teacher.components.get(part, f"{args.teacher.name}/{part}") for part in SHARED}
    card = CARD.substitute(name=args.out.name, size=SIZE, shift=args.shift, clip=teacher.text.clip, t5=teacher.text.t5)
    lines = [f'{part} = "{target}"\n' for part, target in shared.items()]
    (args.out / "card.toml").write_text(card + "".join(lines))


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--teacher", type=Path, default=Path("models/emoji-mmdit"))
    parser.add_argument(
        "--out", type=Path, default=Path("models/emoji-mmdit-turbo"), help="must stand beside --teacher"
    )
    parser.add_argument("--init", type=Path, help="start from this folder's weights, not the teacher's")
    parser.add_argument("--pairs", type=int, default=20000)
    parser.add_argument("--draw", type=int, default=64, help="pairs drawn at once")
    parser.add_argument("--steps", type=int, default=28, help="the teacher's")
    parser.add_argument("--guidance", type=float, default=4.0, help="the teacher's")
    parser.add_argument("--shift", type=float, default=2.0, help="of the student's schedule, as its card names it")
    parser.add_argument("--anywhere", type=float, default=0.2, help="share of times that are on no line")


def main() -> None:
    args = parse(__doc__, "turbo", options, minutes=60, rate=4e-4)
    subjects = load_subjects(args.cache, args.subjects)
    subjects = subjects if args.subjects else read_subjects(args.teacher, subjects)
    text = Text(args.teacher, args.teacher).to(args.device).requires_grad_(False)
    write_pairs(args, build(args.teacher).to(args.device), text, subjects)
    train(args, build(args.init or args.teacher).to(args.device), text, subjects)


def train(args: argparse.Namespace, student: SD3Transformer2DModel, text: Text, subjects: list[Subject]) -> None:
    noise, clean, captions = read_pairs(args.work / "pairs")
    schedule = Schedule(kind="flow", shift=args.shift, spacing="flux")
    training = Training(student, args, weight_decay=0.0)
    quick = torch.compile(student, dynamic=False) if args.compile else student

    def part() -> partial[Tensor]:
        which = training.rng.integers(len(captions), size=training.share)
        times = torch.from_numpy(draw_times(training.rng, schedule, len(which), args.anywhere)).to(args.device)
        ends = (end[which].float().to(args.device) for end in (noise, clean))
        return partial(loss_of, quick, text, [captions[i] for i in which], *ends, times)

    def publish() -> None:
        export(student, subjects, args)
        save_grid(args.work / f"grid-{training.step}.png", look(args, student, text, schedule), 8)

    training.run(lambda: [part() for _ in range(args.threads)], publish)


def look(args: argparse.Namespace, student: nn.Module, text: Text, schedule: Schedule) -> Tensor:
    """float [24, 3, 128, 128]: the same noise in 1, 2 and 4 steps."""
    vae = AutoencoderKL.from_pretrained(args.teacher / "vae", torch_dtype=torch.float32).to(args.device)
    both = embed(text, list(PROBES[:8]), args.device)
    noise = torch.randn(8, *SHAPE, generator=torch.Generator().manual_seed(0)).to(args.device)
    drawn = torch.cat([follow(student, walk(schedule, steps), noise, both, 0.0) for steps in (1, 2, 4)])
    return vae.decode(drawn / vae.config.scaling_factor + vae.config.shift_factor).sample


if __name__ == "__main__":
    main()
