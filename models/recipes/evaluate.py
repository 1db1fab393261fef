"""Score built-in cards through the engine: every subject they know, a random background each, fixed seeds.

It asks the engine as a client would, all pictures of all cards at once, and looks at
what comes back with `nearest.py`. Prints a table and one JSON line.

A card may be given settings of its own: `emoji-mmdit:steps=4,guidance=0,t5=no,lora=emoji-dpo,weight=0.5`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import zlib
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType

import data
import data64
import numpy as np
import torch
from common import to_float
from data import COLOURS, Subject, render
from diffusers import AutoencoderKL
from folder import read_subjects
from nearest import Nearest, twins
from scores import Asked, Score, against, judge, save_grid, summary, table
from tqdm import tqdm

from app.cards.card import Card, Source
from app.cards.cards import read_cards
from app.checkpoints.adapters import survey
from app.jobs.body import read_body
from app.jobs.job import Job
from app.settings import Settings
from app.worker.process import Local


@dataclass(frozen=True)
class Run:
    """One line of the table: a card with the settings that are asked of it; None is the card's default."""

    card: str
    steps: int | None
    guidance: float | None
    t5: bool
    lora: str = ""
    weight: float = 1.0

    @property
    def name(self) -> str:
        said = [f"{self.lora} at {self.weight:g}"] if self.lora else []
        said += [f"{self.steps} steps"] if self.steps is not None else []
        said += [f"guidance {self.guidance:g}"] if self.guidance is not None else []
        return ", ".join([self.card, *said, *([] if self.t5 else ["no T5"])])


def read_run(text: str, steps: int | None, guidance: float | None, t5: bool) -> Run:
    """A run from "card:steps=4,guidance=0,t5=no"; what it does not say is as given."""
    card, _, rest = text.partition(":")
    said = dict(part.split("=", 1) for part in rest.split(",") if part)
    if unknown := said.keys() - {"steps", "guidance", "t5", "lora", "weight"}:
        raise SystemExit(f"{text}: {sorted(unknown)[0]} is none of steps, guidance, t5, lora, weight")
    steps = int(said["steps"]) if "steps" in said else steps
    guidance = float(said["guidance"]) if "guidance" in said else guidance
    t5 = said["t5"] != "no" if "t5" in said else t5
    return Run(card, steps, guidance, t5, said.get("lora", ""), float(said.get("weight", 1)))


def scenes_of(cards: list[Card]) -> ModuleType:
    """The module with the scenes that these cards were trained on: `data`, or `data64` for 64 pixels."""
    sizes = {card.default_size for card in cards}
    if len(sizes) > 1:
        raise SystemExit("cards of different sizes know different subjects: score them one by one")
    return data64 if sizes == {(data64.SIZE, data64.SIZE)} else data


def ask(scenes: ModuleType, subjects: list[Subject], index: int, again: int, classes: bool) -> Asked:
    """What is asked of a subject: always the same, whichever others are. A class says no more than its subject."""
    subject = subjects[index]
    seed = zlib.crc32(f"{subject.key}/{again}".encode())
    rng = np.random.default_rng(seed)
    if classes:
        style = again % len(subject.drawings)
        return Asked(scenes.plain_scene(rng, index, style), scenes.label(subject, style), seed)
    colour = str(rng.choice(list(COLOURS)))
    scene = scenes.draw_scene(rng, [subject], every_pair=True)
    scene = replace(scene, subject=index, colour=colour, colour_named=True)
    return Asked(scene, scenes.caption(rng, scene, subject), seed)


def without_t5(card: Card, folder: Path) -> Card:
    """A card of the same parts, less the T5 encoder and its tokenizer; its only file is an index, under `folder`."""
    index = json.loads((card.folder / str(card.source.path) / "model_index.json").read_text())
    parts = {name for name, entry in index.items() if isinstance(entry, list) and entry[0]} | set(card.components)
    parts -= {"scheduler", "text_encoder_3", "tokenizer_3"}
    components = {part: card.components.get(part, f"{card.id}/{part}") for part in parts}
    own = folder / f"{card.id}-no-t5"
    own.mkdir()
    (own / "model_index.json").write_text(json.dumps({"_class_name": index["_class_name"]}))
    changes = {"id": own.name, "aliases": (), "folder": own, "source": Source(path="."), "components": components}
    return card.model_copy(update=changes)


def with_loras(cards: dict[str, Card], folder: Path) -> dict[str, Card]:
    """The cards as a server has them that was given this folder of LoRAs."""
    adapters = {each.name: each for each in survey(folder, cards)}
    return {name: card.model_copy(update={"adapters": adapters}) for name, card in cards.items()}


def draw(
    settings: Settings, cards: dict[str, Card], wanted: list[tuple[Run, Card, list[Asked]]]
) -> list[tuple[np.ndarray, float]]:
    """For each run its pictures, uint8 [n, side, side, 3], and the seconds that one alone takes (median of 5)."""
    jobs = []
    for number, (run, card, asked) in enumerate(wanted):
        for at, each in enumerate(asked):
            body = {"model": card.id, "seed": each.seed, "num_inference_steps": run.steps}
            body |= {"guidance_scale": run.guidance, "class_label" if card.labels else "prompt": each.text}
            body |= {"loras": [{"name": run.lora, "weight": run.weight}]} if run.lora else {}
            read = read_body(body)
            jobs.append(Job(read.to_request(card, f"{number}/{at}", adapters=card.adapters), card, read))
    found: dict[str, np.ndarray] = {}
    with Local(settings, cards) as local:
        for job in jobs:
            local.submit(job)
        for job in tqdm(jobs, desc="pictures", mininterval=5):
            found[job.request.id] = job.future.result()[0].pixels
        drawn = []
        for number, (_, _, asked) in enumerate(wanted):
            seconds = []
            for job in [job for job in jobs if job.request.id.startswith(f"{number}/")][:5]:
                start = time.perf_counter()
                local.submit(Job(job.request, job.card, job.body)).future.result()
                seconds.append(time.perf_counter() - start)
            pictures = np.stack([found[f"{number}/{at}"] for at in range(len(asked))])
            drawn.append((pictures, statistics.median(seconds)))
    return drawn


@torch.inference_mode()
def ceiling(folder: Path, size: int, subjects: list[Subject], asked: list[Asked]) -> np.ndarray:
    """What the VAE makes of the asked scenes themselves: no network that draws with it can be expected to do better."""
    vae = AutoencoderKL.from_pretrained(folder, torch_dtype=torch.float32)
    pictures = [render(each.scene, subjects[each.scene.subject], size) for each in asked]
    parts = to_float(pictures).split(64)
    decoded = torch.cat([vae.decode(vae.encode(part).latent_dist.mean).sample for part in parts])
    return decoded.add(1).mul(127.5).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cards", nargs="+", help="card[:steps=N][,guidance=G][,t5=no][,lora=NAME][,weight=W]")
    parser.add_argument("--cache", type=Path, default=Path("cache"), help="where the emoji packages lie")
    parser.add_argument("--models", type=Path, default=Path("models"), help="folder of cards")
    parser.add_argument("--loras", type=Path, help="folder of LoRAs; else the folder loras in --models")
    parser.add_argument("--steps", type=int, help="for every card that says none; else the card's default")
    parser.add_argument("--guidance", type=float, help="the same")
    parser.add_argument("--without-t5", action="store_true", help="the same")
    parser.add_argument(
        "--subjects", type=int, default=0, help="ask the first N; 0: what the card's subjects.txt lists"
    )
    parser.add_argument("--among", choices=("all", "asked"), default="all", help="subjects that the nearest is one of")
    parser.add_argument("--each", type=int, default=1, help="pictures of each subject")
    parser.add_argument("--first", type=int, default=0, help="number of the first picture of each: others, other seeds")
    parser.add_argument("--limit", type=int, default=0, help="only N of the pictures, drawn at random but always alike")
    parser.add_argument("--ceiling", action="store_true", help="score the VAE's reconstructions too")
    parser.add_argument("--grid", type=Path, help="PNG of the pictures; of several cards, one each, numbered")
    parser.add_argument("--json", type=Path, help="append the JSON line to this file too")
    parser.add_argument("--dtype", default="auto", choices=("auto", "bfloat16", "float32"))
    parser.add_argument("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    return parser.parse_args()


def plan(args: argparse.Namespace, cards: dict[str, Card], everything: list[Subject], run: Run) -> list[Asked]:
    """The pictures of a run."""
    known = everything[: args.subjects] if args.subjects else read_subjects(cards[run.card].folder, everything)
    known = [subject for subject in known if not cards[run.card].labels or subject.name in cards[run.card].labels]
    if not args.subjects and not (cards[run.card].folder / "subjects.txt").exists():
        print(f"{run.card} has no subjects.txt: it is asked for all {len(everything)}; --subjects N for the first N")
    index = {subject.key: at for at, subject in enumerate(everything)}
    classes = bool(cards[run.card].labels)
    scenes, again = scenes_of([cards[run.card]]), range(args.first, args.first + args.each)
    asked = [ask(scenes, everything, index[s.key], one, classes) for s in known for one in again]
    order = np.random.default_rng(0).permutation(len(asked))[: args.limit or None]
    return [asked[at] for at in order]


def main() -> None:
    args = arguments()
    cards = read_cards(args.models)
    runs = [read_run(text, args.steps, args.guidance, not args.without_t5) for text in args.cards]
    if missing := [run.card for run in runs if run.card not in cards]:
        raise SystemExit(f"{args.models} has no card {missing[0]}")
    everything = scenes_of([cards[run.card] for run in runs]).load_subjects(args.cache)
    settings = Settings(models=args.models, devices=args.device, dtype=args.dtype)
    with tempfile.TemporaryDirectory() as folder:
        bare = {run.card: cards[run.card] for run in runs if not run.t5}
        bare = {name: without_t5(card, Path(folder)) for name, card in bare.items()}
        served = {**cards, **{card.id: card for card in bare.values()}}
        served = with_loras(served, args.loras or args.models / "loras") if any(run.lora for run in runs) else served
        used = [served[run.card if run.t5 else bare[run.card].id] for run in runs]
        wanted = [(r, card, plan(args, cards, everything, r)) for r, card in zip(runs, used, strict=True)]
        drawn = draw(settings, served, wanted)
    report(args, everything, cards, [(run, asked, *each) for (run, _, asked), each in zip(wanted, drawn, strict=True)])


def report(args, everything, cards, drawn) -> None:  # type: ignore[no-untyped-def]
    """Score what was drawn, print it, and write what was asked for."""
    if args.ceiling:
        run, asked = next(((r, a) for r, a, *_ in drawn if not cards[r.card].labels), drawn[0][:2])
        target = cards[run.card].components.get("vae", f"{run.card}/vae").partition("/")
        vae = cards[target[0]].folder / target[2]
        pictures = ceiling(vae, drawn[0][2].shape[1], everything, asked)
        drawn = [*drawn, (Run("the VAE alone", None, None, True), asked, pictures, None)]
    lines, finders, same, scored = [], {}, twins(everything), []
    for number, (run, asked, pictures, seconds) in enumerate(drawn):
        there = sorted({each.scene.subject for each in asked}) if args.among == "asked" else range(len(everything))
        if tuple(there) not in finders:
            finders = {tuple(there): Nearest(everything, args.device, there)}
        scores: list[Score] = []
        for start in tqdm(range(0, len(asked), 256), desc=f"scoring {run.name}", mininterval=5):
            some = slice(start, start + 256)
            scores += judge(finders[tuple(there)], same, asked[some], pictures[some])
        scored.append(scores)
        if number and asked == drawn[0][1]:
            print(f"{run.name} against {drawn[0][0].name}: {against(scores, scored[0])}")
        classes = run.card in cards and bool(cards[run.card].labels)
        lines.append(summary(run.name, scores, seconds, classes))
        if args.grid:
            path = args.grid if len(drawn) == 1 else args.grid.with_stem(f"{args.grid.stem}-{number}")
            save_grid(path, pictures, scores)
        missed = [each.text for each, its in zip(asked, scores, strict=True) if not its.subject]
        print(f"{run.name}: {len(missed)} of {len(asked)} missed: {'; '.join(missed[:40])}")
    print(table(lines))
    facts = {"date": f"{datetime.now(UTC):%Y-%m-%d}", "device": args.device, "dtype": args.dtype, "among": args.among}
    line = json.dumps({**facts, "each": args.each, "runs": lines})
    print(line)
    if args.json:
        with args.json.open("a") as file:
            file.write(line + "\n")


if __name__ == "__main__":
    main()
