"""Upstream draws what the engine draws from the same request: the pipelines around a family's own parts."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from app.cards.card import Card
from app.cards.cards import read_card
from app.errors import InvalidValue
from app.families.base import Family
from app.families.compiling import compile_blocks
from app.pool.pool import Pool
from app.request import ClassLabel, Condition, Prompt, Request, SkipGuidance
from tests.bench.upstream import Upstream
from tests.families.plain import ask, load, serve
from tests.parts.engine import load_all
from tests.parts.requests import changed
from tests.parts.tiers import tiers
from tests.parts.tiny import write_dit, write_sd3

APPLE = Prompt("a red apple", "green")
CASES = [
    ("sd3", "flow_euler", 5, 4.0, (32, 48)),
    ("sd3", "flow_euler", 4, 1.0, (32, 32)),
    ("sd3", "flow_heun", 3, 4.0, (32, 32)),
    ("sd3", "flow_dpmpp_2m", 6, 4.0, (32, 32)),
    ("no-t5", "flow_euler", 4, 3.0, (32, 32)),
    ("no-clip", "flow_euler", 4, 3.0, (32, 32)),
    ("dit", "ddim", 6, 4.0, (32, 32)),
    ("dit", "dpmpp_2m", 5, 1.0, (32, 32)),
    ("schnell", "flow_euler", 4, 1.0, (32, 16)),
    ("schnell", "flow_dpmpp_2m", 4, 3.0, (32, 32)),
    ("dev", "flow_euler", 4, 3.0, (32, 48)),
    ("dev", "flow_dpmpp_2m", 4, 1.0, (64, 64)),
    ("tiny-sd2", "ddim", 5, 4.0, (32, 48)),
    ("tiny-sdxl", "euler", 5, 4.0, (40, 24)),
    ("tiny-sdxl", "euler_ancestral", 4, 1.0, (32, 32)),
]


@pytest.fixture(scope="module")
def drawing(
    checkpoints: Path, fluxes: Path, unets: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Pool, dict[str, Card]]:
    folder = tmp_path_factory.mktemp("no-clip")
    write_sd3(folder / "no-clip", leave_out=("text_encoder_2",))
    places = {name: checkpoints / name for name in ("sd3", "no-t5", "dit")}
    places |= {name: unets / name for name in ("tiny-sd2", "tiny-sdxl")}
    places |= {"no-clip": folder / "no-clip", "schnell": fluxes / "schnell", "dev": fluxes / "dev"}
    cards = {name: read_card(at / "card.toml").model_copy(update={"id": name}) for name, at in places.items()}
    pool = load_all(Pool(cards, "cpu", torch.float32))
    yield pool, cards
    pool.close()


def asked(cards: dict[str, Card], case: tuple[str, str, int, float, tuple[int, int]], seed: int = 7) -> Request:
    name, sampler, steps, guidance, size = case
    condition: Condition = ClassLabel(3) if name == "dit" else APPLE
    card = cards[name]
    embedded = 3.5 if card.guidance == "embedded" else None
    length = card.text_length
    return ask(
        name, condition, steps=steps, guidance=guidance, sampler=sampler, size=size, seed=seed, text_length=length,
        embedded=embedded,
    )  # fmt: skip


def of(pool: Pool, name: str) -> Family:
    family = pool.family(name)
    assert family is not None
    return family


@pytest.mark.parametrize(
    "case",
    tiers(zip(CASES, strict=True), lambda case: CASES.index(case) % 3 == 0),
    ids=lambda case: "-".join(map(str, case[:4])),
)
def test_it_draws_the_engines_picture(drawing: tuple[Pool, dict[str, Card]], case) -> None:
    pool, cards = drawing
    request = asked(cards, case)
    theirs = Upstream(of(pool, case[0])).draw(request)
    (ours,) = serve(pool, request)
    assert theirs.dtype == np.uint8 and theirs.shape == (request.recipe.height, request.recipe.width, 3)
    assert np.abs(theirs.astype(int) - ours.pixels).max() <= 1
    assert theirs.std() > 3, "a picture with something in it"


def test_another_seed_and_another_image_are_other_pictures(drawing: tuple[Pool, dict[str, Card]]) -> None:
    pool, cards = drawing
    upstream, request = Upstream(of(pool, "sd3")), asked(cards, CASES[0])
    other = asked(cards, CASES[0], seed=8)
    both = replace(request, images=(*request.images, *other.images))
    first, second = upstream.draw(both, 0), upstream.draw(both, 1)
    assert np.array_equal(first, upstream.draw(request)) and np.array_equal(second, upstream.draw(other))
    assert np.abs(first.astype(int) - second).max() > 20


def test_skip_layer_guidance_is_the_engines(tmp_path: Path) -> None:
    write_sd3(tmp_path / "sd3", num_layers=3)
    file = tmp_path / "sd3" / "card.toml"
    text = file.read_text().replace(
        "text = {", "skip_layer_guidance = { layers = [1], scale = 2.5, stop = 0.8 }\ntext = {"
    )
    file.write_text(text)
    card = read_card(file)
    pool = load_all(Pool({"sd3": card.model_copy(update={"id": "sd3"})}, "cpu", torch.float32))
    request = changed(asked({"sd3": card}, CASES[0]), skip=SkipGuidance(2.5, 0.01, 0.8))
    plain, skipping = (Upstream(of(pool, "sd3")).draw(one) for one in (changed(request, skip=None), request))
    (ours,) = serve(pool, request)
    pool.close()
    assert np.abs(skipping.astype(int) - ours.pixels).max() <= 1
    assert np.abs(skipping.astype(int) - plain).max() > 1


def test_float32_shares_the_weights_and_bfloat16_copies_them(drawing: tuple[Pool, dict[str, Card]]) -> None:
    pool, cards = drawing
    family, request = of(pool, "sd3"), asked(cards, CASES[1])
    assert Upstream(family).pipeline.transformer is family.network
    half = Upstream(family, dtype=torch.bfloat16)
    away = np.abs(half.draw(request).astype(int) - Upstream(family).draw(request))
    assert 0 < away.mean() < 5, "the same picture, rounded"
    assert {value.dtype for value in half.pipeline.vae.parameters()} == {torch.bfloat16}
    assert {value.dtype for value in family.network.parameters()} == {torch.float32}


@pytest.mark.slow
def test_compiled_blocks_of_the_family_are_not_the_baselines(checkpoints: Path) -> None:
    family = load(checkpoints / "sd3")
    compile_blocks(family.network)
    plain = Upstream(family).pipeline.transformer
    assert all(module._compiled_call_impl is None for module in plain.modules())
    assert any(module._compiled_call_impl is not None for module in family.network.modules())
    assert next(plain.parameters()) is next(family.network.parameters())
    whole = Upstream(family, compiled=True).pipeline.transformer
    assert whole._compiled_call_impl is not None and plain._compiled_call_impl is None


def test_what_a_pipeline_has_not_is_refused(drawing: tuple[Pool, dict[str, Card]], tmp_path: Path) -> None:
    pool, cards = drawing
    for name, sampler in (("dit", "euler"), ("schnell", "flow_heun"), ("sd3", "ddim")):
        with pytest.raises(InvalidValue, match="diffusers draws"):
            Upstream(of(pool, name)).draw(asked(cards, (name, sampler, 4, 1.0, (32, 32))))
    write_dit(tmp_path / "ten")
    with pytest.raises(InvalidValue, match="1000 classes, not 10"):
        Upstream(load(tmp_path / "ten"))
