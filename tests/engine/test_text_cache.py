"""The cache of encoded prompts in the real engine: cards that share a T5, weights that change, and what is told."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from app.cards.card import Bucket, Card
from app.cards.cards import read_card
from app.errors import SettingsError
from app.pool.policy import claim
from app.pool.pool import Pool
from app.report import Memory, ModelState, Result, Tick
from app.request import ImageSpec, Prompt, Request
from tests.engine.texts import forwards
from tests.families.plain import ask
from tests.parts.close import apart
from tests.parts.engine import Bench, load_all
from tests.parts.tiny import write_flux, write_sd3
from tests.parts.tiny_parts import write_first_clip, write_t5

SHARED = {"text_encoder_2": "sd3/text_encoder_3", "tokenizer_2": "sd3/tokenizer_3"}
numbers = iter(range(1000))
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def cards(tmp_path: Path) -> dict[str, Card]:
    """An SD3, and a FLUX.1 that takes its T5."""
    write_sd3(tmp_path / "sd3", name="sd3")
    write_flux(tmp_path / "flux", dev=False)
    flux = read_card(tmp_path / "flux" / "card.toml")
    return {"sd3": read_card(tmp_path / "sd3" / "card.toml"), "flux": flux.model_copy(update={"components": SHARED})}


@pytest.fixture
def made(cards: dict[str, Card]) -> Iterator[Callable[[], Pool]]:
    """Makes pools that have both loaded."""
    pools: list[Pool] = []

    def make() -> Pool:
        pools.append(load_all(Pool(cards, "cpu", torch.float32)))
        return pools[-1]

    yield make
    for pool in pools:
        pool.close()


def prompt(model: str, text: str, *, guided: bool = False, negative: str = "", images: int = 1) -> Request:
    scale, name = 4.0 if guided else 0.0, f"{model}-{next(numbers)}"
    asked = ask(model, Prompt(text, negative), steps=2, guidance=scale, sampler="flow_euler", name=name)
    return replace(asked, images=tuple(ImageSpec(Prompt(text, negative), seed) for seed in range(images)))


def answer(bench: Bench, request: Request) -> tuple[Result, tuple[int, int]]:
    """Its first image, and the (hits, misses) that were told meanwhile."""
    bench.reports.clear()
    bench.engine.submit(request)
    bench.until(lambda: len(bench.results) == len(request.images))
    ticks = [report for report in bench.reports if isinstance(report, Tick)]
    assert not any(tick.text_hits or tick.text_misses for tick in ticks if tick.phase != "encode")
    return bench.results[request.id, 0], (sum(t.text_hits for t in ticks), sum(t.text_misses for t in ticks))


def unload(bench: Bench, *models: str) -> None:
    """Models that are there, at once: what one shares with others stays on the device as long as they do."""

    def absent() -> bool:
        told = [report for report in bench.reports if isinstance(report, ModelState)]
        return {report.model for report in told if report.state == "absent"} == set(models)

    bench.reports.clear()
    for model in models:
        bench.engine.unload(model)
    bench.until(absent)
    bench.turn()


def take_away(pool: Pool, *parts: str) -> None:
    """These parts of the SD3 off the device, as for others that need the room; the model stays."""
    leaving = [pool.models["sd3"].parts[part] for part in parts]
    with pool.lock:
        claim(leaving)
    for one in leaving:
        pool.drop(one)


def held(bench: Bench) -> int:
    """Bytes of encoded prompts as told last."""
    return [report for report in bench.reports if isinstance(report, Memory)][-1].bytes["text"]


def test_two_families_that_share_a_t5_encode_a_prompt_once(made: Callable[[], Pool]) -> None:
    """And give the images that they give without the other, bit for bit in deterministic mode."""
    pool = made()
    bench, families = Bench(pool, deterministic=True), [pool.family("sd3"), pool.family("flux")]
    assert families[0].t5.network is families[1].t5.network  # type: ignore[union-attr]
    with forwards(families[0]) as seen:  # type: ignore[arg-type]
        _, counted = answer(bench, prompt("sd3", "red apple"))
        assert (counted, seen) == ((0, 3), [8, 8, 8])
        ours, counted = answer(bench, prompt("flux", "red apple"))
        assert (counted, len(seen)) == ((1, 1), 3), "the T5's was there, the CLIP is its own"
    alone, counted = answer(Bench(pool, deterministic=True), prompt("flux", "red apple"))
    assert counted == (0, 2) and np.array_equal(ours.latents, alone.latents)
    unload(bench, "sd3")
    t5, clip = 4 * 24 * 48, 4 * 16
    assert held(bench) == t5 + clip
    assert answer(bench, prompt("flux", "red apple"))[1] == (2, 0)
    unload(bench, "flux")
    assert held(bench) == 0


def test_weights_that_were_changed_while_the_model_was_away_give_other_images(
    cards: dict[str, Card], made: Callable[[], Pool]
) -> None:
    bench, request = Bench(made(), deterministic=True), prompt("sd3", "red apple", guided=True)
    before, _ = answer(bench, request)
    assert answer(bench, prompt("flux", "red apple"))[1] == (1, 1)
    unload(bench, "sd3", "flux")
    assert held(bench) == 0
    folder = cards["sd3"].folder
    write_t5(folder / "text_encoder_3", folder / "tokenizer_3", seed=77)
    write_first_clip(folder / "text_encoder", folder / "tokenizer", seed=78)
    after, counted = answer(bench, request)
    fresh, _ = answer(Bench(made(), deterministic=True), request)
    assert counted == (0, 6) and np.array_equal(after.latents, fresh.latents)
    apart(after.latents, before.latents, 1e-3)


def test_an_encoder_that_was_away_is_asked_again_only_if_its_files_changed(
    cards: dict[str, Card], made: Callable[[], Pool]
) -> None:
    pool, request, folder = made(), prompt("sd3", "red apple", guided=True), cards["sd3"].folder
    bench = Bench(pool, deterministic=True)
    before, _ = answer(bench, request)
    take_away(pool, "text_encoder", "text_encoder_3")
    same, counted = answer(bench, request)
    assert counted == (6, 0) and np.array_equal(same.latents, before.latents)
    take_away(pool, "text_encoder", "text_encoder_3")
    write_t5(folder / "text_encoder_3", folder / "tokenizer_3", seed=77)
    after, counted = answer(bench, request)
    fresh, _ = answer(Bench(made(), deterministic=True), request)
    assert counted == (4, 2) and np.array_equal(after.latents, fresh.latents)
    assert not np.array_equal(after.latents, before.latents)


def test_models_with_other_buckets_have_their_own_bits(cards: dict[str, Card], made: Callable[[], Pool]) -> None:
    """The number of texts in a forward decides bits: what one model encoded is not what the other one would have."""
    cards["flux"] = cards["flux"].model_copy(update={"bucket": Bucket(encode=4)})
    pool = made()
    bench = Bench(pool, deterministic=True)
    assert answer(bench, prompt("sd3", "red apple"))[1] == (0, 3)
    after, counted = answer(bench, prompt("flux", "red apple"))
    alone, _ = answer(Bench(pool, deterministic=True), prompt("flux", "red apple"))
    assert counted == (0, 2) and np.array_equal(after.latents, alone.latents)


def test_texts_are_counted_once_a_batch_for_each_encoder(made: Callable[[], Pool]) -> None:
    bench = Bench(made())
    counts = [
        answer(bench, request)[1]
        for request in (
            prompt("sd3", "cat", guided=True, images=4),  # "cat" and ""
            prompt("sd3", "cat", guided=True, images=4),
            prompt("sd3", "cat", guided=True, negative="dog"),
            prompt("sd3", "dog", guided=True, negative="cat"),
            prompt("sd3", "", guided=True),  # one text, twice in its row
            prompt("sd3", "moon"),
        )
    ]
    assert counts == [(0, 6), (6, 0), (3, 3), (6, 0), (3, 0), (0, 3)]
    assert held(bench) == 4 * 4 * (25 * (16 + 24) + 24 * 48), "cat, dog, moon and the empty one"


def test_a_prompt_that_is_cut_is_told_with_every_image(made: Callable[[], Pool]) -> None:
    bench = Bench(made())
    long = prompt("flux", "a red Cat and the " * 5 + "End.")
    first, again = answer(bench, long), answer(bench, long)
    assert (first[1], again[1]) == ((0, 2), (2, 0)) and np.array_equal(first[0].latents, again[0].latents)
    assert first[0].warnings == again[0].warnings and '"Cat and the End."' in first[0].warnings[0]
    assert answer(bench, prompt("flux", "red"))[0].warnings == ()


def test_a_negative_prompt_that_is_cut_is_told_where_it_is_read(made: Callable[[], Pool]) -> None:
    bench, long = Bench(made()), "a red Cat and the " * 5 + "End."
    (cut,) = answer(bench, prompt("sd3", "dog", guided=True, negative=long))[0].warnings
    assert cut.startswith("the negative prompt is too long for the text encoder") and cut.endswith('End."')
    both = answer(bench, prompt("sd3", long, guided=True, negative=long))[0].warnings
    assert [text.partition(" is")[0] for text in both] == ["the prompt", "the negative prompt"]
    assert answer(bench, prompt("sd3", "dog", negative=long))[0].warnings == (), "an unguided request reads none"


def test_the_setting_bounds_what_is_held(made: Callable[[], Pool], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("INSTEP_TEXT_CACHE", "30kB")
    bench = Bench(made())
    bench.run([prompt("sd3", f"red {number} apple", guided=True) for number in range(20)])
    told: list[Any] = [report.bytes["text"] for report in bench.reports if isinstance(report, Memory)]
    assert 20_000 < max(told) <= 30_000 and len(bench.results) == 20
    monkeypatch.setenv("INSTEP_TEXT_CACHE", "a lot")
    with pytest.raises(SettingsError, match="INSTEP_TEXT_CACHE"):
        Bench(made())
