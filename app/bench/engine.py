"""One denoising step by its passes, and one image stage by stage, through the engine in this process."""

import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode, sdpa_flop_count

from app.bench.machine import Samples, alternate, milliseconds, seconds
from app.cards.card import Card
from app.engine.engine import Engine
from app.engine.runner import plan_of
from app.engine.step import Slots, denoise_step
from app.families.base import Family
from app.families.compiling import as_written
from app.imaging import encode_image
from app.jobs.body import read_body
from app.pool.pool import Pool
from app.report import Failure, Report, Result
from app.request import Guidance, Request
from app.samplers.table import compile_table
from app.settings import Settings

Draw = Callable[[], np.ndarray]


def ask(card: Card, **fields: Any) -> Request:
    """The measured request: these fields of a body, else the card's defaults. Raises InvalidValue as a server does."""
    shown = {"class_label": 0} if card.draws_classes else {"prompt": "a red apple"}
    return read_body({**shown, **fields, "seed": 0}).to_request(card, "bench")


def measure_steps(
    family: Family, width: int, height: int, passes: Sequence[int], rounds: int, most: Mapping[str, float]
) -> list[dict[str, Any]]:
    """Time the engine's step for unguided rows of one pass, in turns; a row of the JSON line for each number of passes.

    most: the ceilings of the machine.
    """
    works = {count: forward_work(family, width, height, count) for count in passes}
    with torch.inference_mode():
        times = alternate({str(count): _way(family, width, height, count) for count in passes}, rounds)
    return [_row(count, times[str(count)], work, most) for count, work in works.items()]


def _row(passes: int, times: Sequence[float], work: Mapping[str, float], most: Mapping[str, float]) -> dict[str, Any]:
    ms = milliseconds(times)
    floor = max(1e3 * work["gflop"] / most["matmul_gflops"], work["mbytes"] / most["copy_gbytes"])
    shares = {"ms_a_pass": ms["median"] / passes, "floor_ms": floor, "share_of_floor": floor / ms["median"]}
    return {"passes": passes, "ms": ms, **work, **{name: round(value, 4) for name, value in shares.items()}}


def _way(family: Family, width: int, height: int, passes: int) -> Callable[[], float]:
    """A function that runs one step of this many rows of the card's default sampler and returns its seconds."""
    card, shape = family.card, family.latent_shape(width, height)
    tokens = family.image_tokens(width, height)
    table = compile_table(card.schedule, card.defaults.sampler, card.defaults.num_inference_steps, tokens=tokens)
    slots = Slots(passes, shape, family.device)
    scale = card.defaults.guidance_scale if card.guidance == "embedded" else 0.0
    conditions = {name: value for name, value in family.blank(card.text_length).items() if name != "guidance"}
    first = torch.randn(passes, *shape, generator=torch.Generator().manual_seed(0)) * table.init
    plan = plan_of(table, Guidance(embedded=scale))
    rows = np.array([slots.take(plan, noise, conditions) for noise in first], np.int64)
    start = slots.x.clone()

    def step() -> float:
        slots.x.copy_(start)  # a network of random weights would leave the range of floats
        return seconds(lambda: denoise_step(family, slots, rows), family.device)

    return step


def forward_work(family: Family, width: int, height: int, passes: int) -> dict[str, float]:
    """Count the work of one forward: gflop, 1e9 operations of its matrix products, two a multiply-add; and mbytes.

    The bytes are every weight once, latents and conditions in, the output out; a cache may keep what is between layers.
    """
    x = torch.zeros(passes, *family.latent_shape(width, height), device=family.device)
    blank = family.blank(family.card.text_length)
    conditions = {name: value.expand(passes, *value.shape[1:]).contiguous() for name, value in blank.items()}
    # NOTE: torch's counter knows the attention of GPUs, but not that of CPUs.
    attention = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formula = {attention: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v)}  # type: ignore[no-untyped-call]
    counter = FlopCounterMode(display=False, custom_mapping=formula)
    with torch.no_grad(), as_written(family.network), counter:
        out, frac = family.denoise(x, torch.zeros(passes, device=family.device), conditions)
    moved = [*family.network.parameters(), x, *conditions.values(), out, *(() if frac is None else (frac,))]
    return {"gflop": counter.get_total_flops() / 1e9, "mbytes": sum(tensor.nbytes for tensor in moved) / 1e6}


def measure_image(
    pool: Pool, settings: Settings, request: Request, rounds: int, others: Mapping[str, Draw] | None = None
) -> tuple[Samples, Samples, dict[str, np.ndarray]]:
    """Draw the request by every way in turns: seconds by way, seconds by stage of Instep's, the last picture by way.

    "instep" encodes its prompt anew and "instep-cached" has it; both keep the empty prompt, as a server that has run
    does. others: ways of other systems, which leave the device as they find it.
    """
    results: dict[str, list[Result]] = {"instep": [], "instep-cached": []}
    forgetful = settings.model_copy(update={"text_cache": "0"})
    draws: dict[str, Draw] = {
        "instep": _draw(pool, forgetful, request, results["instep"]),
        "instep-cached": _draw(pool, settings, request, results["instep-cached"]),
        **(others or {}),
    }
    pictures: dict[str, np.ndarray] = {}

    def way(name: str) -> float:
        return seconds(lambda: pictures.update({name: draws[name]()}), pool.device)

    times = alternate({name: partial(way, name) for name in draws}, rounds)
    stages = _stages(*(found[-rounds:] for found in results.values()))
    stages["encode PNG"] = [
        seconds(lambda: encode_image(pictures["instep"], "png", None, {}), torch.device("cpu")) for _ in range(rounds)
    ]
    return times, stages, pictures


def _draw(pool: Pool, settings: Settings, request: Request, results: list[Result]) -> Draw:
    """A function that draws the request by an engine of its own, and appends the result to `results`."""
    reports: list[Report] = []
    engine = Engine(pool, settings, reports.append)

    def draw() -> np.ndarray:
        reports.clear()
        engine.submit(request)
        while not (answers := [report for report in reports if isinstance(report, Result | Failure)]):
            if not engine.tick():
                time.sleep(0.0005)
        if isinstance(answers[0], Failure):
            raise answers[0].error
        results.append(answers[0])
        return answers[0].pixels

    return draw


def _stages(fresh: list[Result], cached: list[Result]) -> Samples:
    """Seconds by stage, from the engine's own timings.

    NOTE: the engine waits for a step at the next work, so that on a GPU the last step of an image counts as its decode.
    """
    both = [one.timings for one in fresh + cached]
    return {
        "encode text, fresh": [one.timings.encode for one in fresh],
        "encode text, cached": [one.timings.encode for one in cached],
        "denoise": [one.denoise for one in both],
        "denoise, a step": [one.denoise / one.steps for one in both],
        "decode": [one.decode for one in both],
    }
