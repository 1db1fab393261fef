"""`instep demo`: twelve mixed requests through one engine, and the forwards they shared, counted by its Ticks."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn

from app.cards.card import Card
from app.cards.catalog import Registry
from app.cards.folder import ModelFolder
from app.cli.generate import build
from app.cli.options import Folder, open_registry, read_settings
from app.cli.paint import follow, half_blocks, results, shrink
from app.errors import NotDownloaded
from app.imaging import grid
from app.jobs.job import Job
from app.report import Progress as Step
from app.report import Report, Result, Tick
from app.samplers.table import valid_samplers
from app.worker.process import Local

WORDS = (
    "red apple", "blue heart", "yellow star", "green tree", "orange cat", "purple umbrella",
    "pizza", "red car", "sun", "brown dog", "pink flower", "white snowman",
)  # fmt: skip

KINDS = ("text", "turbo", "labels")
"""Kinds of cards, the one that stands for an absent kind first."""

SCRIPT = (
    # kind, steps, guided, which sampler of the card's, forwards that have run when it arrives
    ("text", 50, True, 0, 0),
    ("text", 28, True, 0, 0),
    ("text", 40, False, 0, 0),
    ("labels", 30, True, 0, 0),
    ("text", 20, True, 2, 2),
    ("turbo", 4, False, 0, 5),
    ("labels", 50, False, 0, 8),
    ("text", 12, True, 1, 12),
    ("turbo", 2, False, 0, 16),
    ("text", 8, True, 0, 20),
    ("text", 4, False, 0, 25),
    ("text", 1, False, 0, 30),
)


@dataclass
class Tally:
    """Counts forwards and submits each job when its turn has come. Its methods run on the engine's thread.

    arrivals: jobs, and the forwards that have run when each arrives. waited: by request id, the denoising forwards
    that ran between its arrival and the first that it took part in.
    """

    arrivals: list[tuple[int, Job]]
    local: Local | None = None
    forwards: int = 0
    arrived: dict[str, int] = field(default_factory=dict)
    waited: dict[str, int] = field(default_factory=dict)

    def let_in(self, idle: bool = False) -> None:
        """Submit those whose turn has come; when the engine has nothing left to do, the next one in any case."""
        while self.local and self.arrivals and (idle or self.arrivals[0][0] <= self.forwards):
            job = self.arrivals.pop(0)[1]
            self.arrived[job.request.id] = self.forwards
            self.local.submit(job)
            idle = False

    def __call__(self, report: Report) -> None:
        if isinstance(report, Step) and report.request_id not in self.waited:
            self.waited[report.request_id] = self.forwards - self.arrived[report.request_id]
        elif isinstance(report, Tick):
            self.forwards += report.phase == "denoise"
            self.let_in(idle=report.running + report.waiting == 0)


def demo(models: Folder = None) -> None:
    """Run twelve requests of 1 to 50 steps, guided and unguided, in one engine at once."""
    settings = read_settings(models=models)
    registry = open_registry(settings)
    script = write_script(registry)
    console, tally, jobs = Console(), Tally([*script]), [job for _, job in script]
    bars = Progress(TextColumn("{task.description}", markup=False), BarColumn(24), MofNCompleteColumn())
    follow(jobs, lambda job, _: line_of(job), bars)
    with Local(settings, registry.cards, observe=tally) as tally.local, bars:
        tally.let_in()
        drawn = [result for (result,) in results(jobs)]
    if console.is_terminal:
        console.print(half_blocks(sheet([result.pixels for result in drawn]), console.width))
    console.print(summary(tally, drawn), highlight=False)


def write_script(registry: Registry) -> list[tuple[int, Job]]:
    """The twelve jobs with their arrivals, for whatever cards there are."""
    cards = cast_cards(registry)
    script = []
    for index, (kind, steps, guided, which, arrival) in enumerate(SCRIPT):
        card = cards[kind]
        samplers = valid_samplers(card.schedule)
        body = {
            "model": card.id,
            "num_inference_steps": min(steps, card.limits.num_inference_steps),
            "guidance_scale": min(4.0, card.limits.guidance_scale) if guided else 0.0,
            "sampler": samplers[(samplers.index(card.defaults.sampler) + which) % len(samplers)],
            "seed": index,
            **({"class_label": index * 7 % len(card.labels)} if card.draws_classes else {"prompt": WORDS[index]}),
        }
        script.append((arrival, build(body, registry, f"demo-{index}")))
    return script


def line_of(job: Job) -> str:
    """The words before a job's bar."""
    recipe, guidance = job.request.recipe, job.request.recipe.guidance
    with_guidance = f"guidance {guidance.scale:g}" if guidance.guided else "no guidance"
    return f"{job.shows[:18]:18} {job.card.id:18} {recipe.sampler:15} {with_guidance:11}"


def cast_cards(registry: Registry) -> dict[str, Card]:
    """A card for each kind of request, of those whose files are here; a kind without a card is drawn by another's.

    Raises NotDownloaded: there is no model here.
    """
    found: dict[str, Card] = {}
    for card in sorted(registry.cards.values(), key=lambda card: (card is not registry.default, card.parameters or 0)):
        if ModelFolder(card, registry.all).here() and (card.labels or not card.draws_classes):
            found.setdefault(_kind(card), card)
    if not found:
        raise NotDownloaded("the demo draws with models that are here, and none is; `instep models list` shows them")
    main = next(found[kind] for kind in KINDS if kind in found)
    return {kind: found.get(kind, main) for kind in KINDS}


def _kind(card: Card) -> str:
    quick = card.defaults.guidance_scale <= 1 and card.defaults.num_inference_steps <= 8
    return "labels" if card.draws_classes else "turbo" if quick else "text"


def sheet(pictures: list[np.ndarray]) -> np.ndarray:
    """All pictures at the size of the smallest, six in a row."""
    height, width = (min(picture.shape[axis] for picture in pictures) for axis in (0, 1))
    return grid([shrink(picture, width, height) for picture in pictures], 6)


def summary(tally: Tally, drawn: Sequence[Result]) -> str:
    """The last line: forwards run, forwards that as many separate loops would have run, and the shortest's wait."""
    alone = sum(result.timings.steps for result in drawn)
    shortest = min(drawn, key=lambda result: result.timings.steps)
    waited = tally.waited[shortest.request_id]
    return f"{len(drawn)} images, {tally.forwards} forwards instead of {alone}; the shortest waited {waited} steps"
