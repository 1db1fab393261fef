"""Requests that start from a picture: their size, their strength, the overlay, and what replies and files say."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from jsonschema import Draft202012Validator

from app.cards.card import Card, Sizes
from app.cards.cards import read_cards
from app.cards.catalog import Registry
from app.errors import InvalidValue
from app.imaging import a1111
from app.jobs.body import ImageBody, bounds, read_body
from app.jobs.edit import EditBody, nearest_size, read_edit, with_source
from app.jobs.job import Job
from app.jobs.replies import ImagesReply, effective, facts, overlaid, usage, warnings
from app.jobs.schema import edit_schema
from app.report import Preview, Result, Timings
from app.request import Source
from app.settings import Settings

TIMINGS = Timings(queue=1.0, encode=0.2, denoise=3.0, decode=0.1, steps=4, shared=2.0)
CARDS = read_cards(Path(__file__).parents[2] / "models")


@pytest.fixture
def registry(settings: Settings) -> Registry:
    return Registry(read_cards(settings.models), settings)


def job(registry: Registry, source: Source | None = None, **fields: object) -> Job:
    """That of an edit, of 32 x 32 pixels where the fields name no size."""
    what = {"class_label": 1} if "label" in str(fields.get("model")) else {"prompt": "a"}
    body = read_edit({"seed": 1, **what, **fields})
    card = registry.find(body.model)
    found = Job(body.to_request(card, "id"), card, body)
    size = found.request.recipe.width * found.request.recipe.height
    found.request = with_source(found.request, source or Source(bytes(3 * size)))
    return found


def half(value: int) -> Source:
    """A source of 32 x 32 random pixels with a mask of 0 in its upper half and of this value in the lower one."""
    pixels = np.random.default_rng(1).integers(0, 256, (32, 32, 3), np.uint8)
    mask = np.zeros((32, 32), np.uint8)
    mask[16:] = value
    return Source(pixels.tobytes(), mask.tobytes())


@pytest.mark.parametrize(
    ("model", "picture", "size"),
    [
        ("sd3-medium", (1024, 1024), (1024, 1024)),
        ("sd3-medium", (64, 64), (1024, 1024)),
        ("sd3-medium", (1023, 1000), (1024, 1008)),
        ("sd3-medium", (4032, 3024), (1152, 864)),
        ("sd3-medium", (3024, 4032), (864, 1152)),
        ("sd3-medium", (1920, 1080), (1392, 784)),
        ("sd3-medium", (20000, 10), (1536, 256)),
        ("dit-xl-2-256", (640, 480), (256, 256)),
    ],
)
def test_the_size_that_suits_a_picture(model: str, picture: tuple[int, int], size: tuple[int, int]) -> None:
    card = CARDS[model]
    assert nearest_size(card, *picture) == size
    assert read_edit({"size": "auto"}).sized(card, *picture).size == "{}x{}".format(*size)
    assert read_edit({"size": "512x512"}).sized(card, *picture).size == "512x512"


@pytest.mark.parametrize("square", [False, True])
def test_the_nearest_size_is_the_one_that_a_plain_search_finds(square: bool) -> None:
    card, dice = CARDS["sd3-medium"], np.random.default_rng(3)
    sizes = Sizes(min=100, max=900, multiple=72, square=square)
    card = card.model_copy(
        update={
            "limits": card.limits.model_copy(update={"sizes": sizes}),
            "defaults": card.defaults.model_copy(update={"size": "504x504"}),
        }
    )
    every = [(w, h) for w in range(144, 901, 72) for h in range(144, 901, 72) if w == h or not square]
    for width, height in dice.integers(1, 5000, (200, 2)).tolist():

        def distance(size: tuple[int, int], shape: float = width / height) -> float:
            return float(abs(np.log(size[0] / size[1] / shape)) + abs(np.log(size[0] * size[1] / 504**2)) / 16)

        assert distance(nearest_size(card, width, height)) == pytest.approx(min(map(distance, every)))


def test_a_strength_is_the_cards_own_by_default_and_part_of_the_recipe(registry: Registry) -> None:
    card = registry.find(None)
    weak = card.model_copy(update={"defaults": card.defaults.model_copy(update={"strength": 0.3})})
    assert read_edit({"prompt": "a"}).to_request(weak, "id").recipe.strength == 0.3
    assert read_edit({"prompt": "a", "strength": 1}).to_request(weak, "id").recipe.strength == 1
    assert read_body({"prompt": "a"}).to_request(weak, "id").recipe.strength is None


@pytest.mark.parametrize("strength", [0, 0.009, 1.01, -1, "0.5", float("nan")])
def test_a_strength_out_of_range_is_refused(registry: Registry, strength: object) -> None:
    with pytest.raises(InvalidValue, match=r"^strength: expects ") as caught:
        job(registry, strength=strength)
    assert caught.value.param == "strength"


def test_a_strength_that_leaves_no_step_is_refused(registry: Registry) -> None:
    enough = job(registry, model="tiny-label", strength=0.25)
    assert enough.card.legs(enough.request.recipe)["tiny-label"].lines == 1
    with pytest.raises(InvalidValue) as caught:
        job(registry, model="tiny-label", strength=0.24)
    assert caught.value.param == "strength"


@pytest.mark.parametrize(("blur", "width", "pixels"), [(None, 512, 4), (None, 64, 0.5), (8, 1024, 16), (0, 1024, 0)])
def test_the_soft_edge_grows_with_the_image(registry: Registry, blur: float | None, width: int, pixels: float) -> None:
    recipe = replace(job(registry).request.recipe, width=width, height=32)
    assert read_edit({"mask_blur": blur}).reading(recipe) == (width, 32, "crop", pixels)


def test_a_source_is_part_of_the_recipe_by_its_digest(registry: Registry) -> None:
    requests = [job(registry, source).request for source in (None, half(0), half(255), half(255))]
    plain, none, all_, again = (request.recipe for request in requests)
    assert len({plain, none, all_}) == 3 and all_ == again and len(all_.source) == 64
    assert [recipe.masked for recipe in (plain, none, all_)] == [False, True, True]


@pytest.mark.parametrize("kind", [Result, Preview])
def test_pixels_outside_of_the_mask_are_those_of_the_source(registry: Registry, kind: type) -> None:
    drawn = np.random.default_rng(2).integers(0, 256, (32, 32, 3), np.uint8)
    image = Result("id", 0, 1, drawn, TIMINGS) if kind is Result else Preview("id", 0, 0, drawn)
    source = half(255)
    kept = np.frombuffer(source.pixels, np.uint8).reshape(32, 32, 3)
    laid = overlaid(job(registry, source), image)
    assert laid.dtype == np.uint8
    assert np.array_equal(laid[:16], kept[:16]) and np.array_equal(laid[16:], drawn[16:])
    assert np.array_equal(overlaid(job(registry, source, overlay=False), image), drawn)
    assert np.array_equal(overlaid(job(registry), image), drawn)


def test_the_soft_edge_mixes_in_proportion(registry: Registry) -> None:
    for value in range(256):
        source = half(value)
        kept = np.frombuffer(source.pixels, np.uint8).reshape(32, 32, 3)[16:].astype(float)
        drawn = np.full((32, 32, 3), 255 - value // 2, np.uint8)
        laid = overlaid(job(registry, source), Result("id", 0, 1, drawn, TIMINGS))[16:]
        mixed = drawn[16:] * (value / 255) + kept * (1 - value / 255)
        assert np.abs(laid - mixed).max() <= 0.5 + 1e-9


def test_a_source_counts_as_an_image_that_goes_in(registry: Registry) -> None:
    asked = job(registry, size="64x48")
    counted = usage([asked.request.recipe] * 2)
    assert counted.model_dump() == {
        "input_tokens": 48 + 24,
        "output_tokens": 24,
        "total_tokens": 48 + 24 + 24,
        "input_tokens_details": {"text_tokens": 48, "image_tokens": 24},
    }


def test_the_file_has_what_draws_it_again_from_the_same_picture(registry: Registry) -> None:
    asked = job(registry, half(255), strength=0.75, mask_blur=8, resize="pad", overlay=False)
    told = facts(asked, [0])
    assert told.items() >= {"strength": 0.75, "mask_blur": 8, "resize": "pad", "overlay": False}.items()
    again = job(registry, half(255), **told)
    assert again.request.recipe == asked.request.recipe and facts(again, [0]) == told
    assert "Denoising strength: 0.75" in a1111(told)
    plain = facts(job(registry, mask_blur=4, resize="crop", overlay=True), [0])
    assert plain["strength"] == 0.6 and not plain.keys() & {"mask_blur", "resize", "overlay"}


def test_the_reply_has_the_strength(registry: Registry) -> None:
    told = effective(job(registry), 1)
    assert told["strength"] == 0.6 and told.keys() <= ImagesReply.model_fields.keys()


@pytest.mark.parametrize(
    ("fields", "source", "words"),
    [
        ({"mask_blur": 2}, None, ["mask_blur is ignored: there is no mask"]),
        ({"overlay": True}, None, ["overlay is ignored: there is no mask"]),
        ({"overlay": False, "mask_blur": 2}, half(255), []),
        (
            {"input_fidelity": "high"},
            None,
            ["input_fidelity is ignored: strength says how much changes"],
        ),
        ({"input_fidelity": "low", "background": "auto"}, None, []),
        ({"background": "transparent"}, None, ["background is ignored: pictures are opaque"]),
        (
            {"stream": True, "num_inference_steps": 4, "strength": 0.5, "partial_images": 3},
            None,
            ["partial_images: at most 1 come before an image of 2 steps"],
        ),
    ],
)
def test_warnings(registry: Registry, fields: dict[str, object], source: Source | None, words: list[str]) -> None:
    assert warnings(job(registry, source, **fields), []) == words


@pytest.mark.parametrize("card", CARDS.values(), ids=CARDS)
def test_every_card_has_bounds_for_every_field_that_it_takes(card: Card) -> None:
    more = bounds(card, kind=EditBody).keys() - bounds(card).keys()
    assert more == EditBody.model_fields.keys() - ImageBody.model_fields.keys()
    for form in (False, True):
        schema = edit_schema(card, True, form=form, variation=False)
        Draft202012Validator.check_schema(schema)
        assert schema["properties"]["strength"]["default"] == card.defaults.strength
        assert schema["properties"].keys() == bounds(card, kind=EditBody).keys() | {"image", "mask", "mask_image"}
