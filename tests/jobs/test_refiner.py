"""`refiner` and the sizes of a body: which models fit, what becomes of them in a recipe, and what is shown of it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator

from app.cards.cards import read_cards
from app.cards.catalog import Registry, faults
from app.errors import Code, InstepError
from app.imaging import a1111
from app.jobs.body import read_body
from app.jobs.edit import read_edit
from app.jobs.facts import facts, recipe_facts
from app.jobs.job import Job
from app.jobs.replies import ImagesReply, warnings
from app.jobs.schema import body_schema
from app.request import Framing, Recipe, Refiner
from app.settings import Settings
from tests.parts.refiners import PLAIN, write_model, write_refiners
from tests.parts.requests import refused


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> Registry:
    folder = write_refiners(tmp_path_factory.mktemp("refiners") / "models")
    cards = read_cards(folder)
    assert not cards.skipped
    return Registry(cards, Settings(models=folder))


def job_of(registry: Registry, model: str = "base", read: Any = read_body, **fields: Any) -> Job:
    body, card = read({"prompt": "a", "seed": 1, **fields}), registry.find(model)
    refiner = body.refined_by(card, registry)
    return Job(body.to_request(card, "id", refiner=refiner), card, body, refiner=refiner)


def recipe(registry: Registry, model: str = "base", **fields: Any) -> Recipe:
    return job_of(registry, model, **fields).request.recipe


def test_a_recipe_has_its_refiner_by_id(registry: Registry) -> None:
    asked = recipe(registry, refiner={"model": "fine"})
    assert asked.refiner == Refiner("fine", 0.8) and asked.key == recipe(registry).key
    assert recipe(registry, refiner={"model": "finer", "switch_at": 0.25}).refiner == Refiner("fine", 0.25)
    assert recipe(registry).refiner is None and recipe(registry, refiner=None).refiner is None
    edit = job_of(registry, read=read_edit, refiner={"model": "fine"}, strength=0.5).request.recipe
    assert edit.refiner == Refiner("fine", 0.8) and edit.strength == 0.5


def test_a_card_may_have_one_which_a_body_can_change_or_leave_out(registry: Registry) -> None:
    assert recipe(registry, "auto").refiner == Refiner("fine", 0.5)
    assert recipe(registry, "auto", refiner={"model": "base"}).refiner == Refiner("base", 0.8)
    assert recipe(registry, "auto", refiner={"model": "none"}).refiner is None
    assert recipe(registry, "base", refiner={"model": "none"}) == recipe(registry, "base")
    assert recipe(registry, "tiny-label", prompt=None, class_label=1, refiner={"model": "none"}).refiner is None


@pytest.mark.parametrize(
    ("refiner", "field", "said", "code"),
    [
        ("fine", "refiner", "expects a JSON object", "invalid_value"),
        ({}, "refiner.model", "is required", "invalid_value"),
        ({"model": ""}, "refiner.model", "is empty", "invalid_value"),
        ({"model": 7}, "refiner.model", "expects a string", "invalid_value"),
        ({"model": "fine", "strength": 1}, "refiner.strength", "is an unknown field", "invalid_value"),
        *(
            ({"model": "fine", "switch_at": wrong}, "refiner.switch_at", "a number over 0 and under 1", "invalid_value")
            for wrong in (0, 1, -0.1, 1.2, "0.8", True, float("nan"))
        ),
        ({"model": "fin"}, "refiner.model", 'There is no model "fin"; did you mean "fine"?', "model_not_found"),
        ({"model": "base"}, "refiner.model", "it is the same model", "invalid_value"),
        ({"model": "inked"}, "refiner.model", "it has LoRAs of its own", "invalid_value"),
        ({"model": "tiny-label"}, "refiner.model", "one of them draws classes", "invalid_value"),
        ({"model": "tiny-text"}, "refiner.model", "the config of tiny-text's VAE cannot be read", "invalid_value"),
        ({"model": "scaled"}, "refiner.model", "its VAE's scaling_factor is 1.25, not 1.5", "invalid_value"),
        ({"model": "deeper"}, "refiner.model", "16 channels for 4 x 4 pixels, not 16 channels for 8 x 8 pixels",
         "invalid_value"),
        ({"model": "shifted"}, "refiner.model", "its schedule's shift is 2.0, not 3.0", "invalid_value"),
        ({"model": "dev"}, "refiner.model", "its guidance is embedded, not cfg", "invalid_value"),
    ],
)  # fmt: skip
def test_what_is_refused(registry: Registry, refiner: Any, field: str, said: str, code: Code) -> None:
    with pytest.raises(InstepError) as error:
        job_of(registry, refiner=refiner)
    assert (error.value.param, error.value.code) == (field, code) and said in error.value.message


def test_a_size_must_be_one_of_the_refiners_too(registry: Registry) -> None:
    assert recipe(registry, size="48x48", refiner={"model": "fine"}).refiner
    with refused("invalid_value", '^refiner: fine has no size "64x32"') as error:
        job_of(registry, size="64x32", refiner={"model": "fine"})
    assert error.value.param == "refiner" and "16 to 48 pixels" in error.value.message


def test_the_ones_that_fit_are_listed(registry: Registry) -> None:
    assert registry.refiners(registry.find("base")) == ["auto", "fine", "shared"]
    assert registry.refiners(registry.find("inked")) == ["auto", "base", "shared"]
    assert registry.refiners(registry.find("tiny-label")) == registry.refiners(registry.find("dev")) == []


def test_a_key_needs_both_models(registry: Registry) -> None:
    """A refiner that it may not use does not exist for it, in the words for a name that nobody has."""
    view = registry.only(frozenset({"base", "shared", "auto"}))
    assert view.refiners(view.find("base")) == ["auto", "shared"]
    messages = []
    for name in ("fine", "feni"):
        with refused("model_not_found") as error:
            job_of(view, refiner={"model": name})
        messages.append(error.value.message.replace(name, "?"))
    assert messages[0] == messages[1]
    with refused("model_not_found", '^refiner: this key may not use that of auto; {"model": "none"} draws without it$'):
        job_of(view, "auto")
    assert recipe(view, "auto", refiner={"model": "none"}).refiner is None


def test_the_error_of_a_default_says_how_to_draw_without_it(tmp_path: Path) -> None:
    write_model(tmp_path, "base", more='refiner = { model = "scaled" }\n')
    write_model(tmp_path, "scaled", scaling_factor=1.25)
    registry = Registry(read_cards(tmp_path), Settings(models=tmp_path))
    with refused("invalid_value", 'scaling_factor is 1.25, not 1.5; {"model": "none"} draws without it$') as error:
        job_of(registry)
    assert error.value.param == "refiner"
    with refused("invalid_value", "scaling_factor is 1.25, not 1.5$"):
        job_of(registry, refiner={"model": "scaled"})


def test_a_default_that_does_not_fit_is_a_fault_that_a_reload_reports(tmp_path: Path) -> None:
    write_model(tmp_path, "base", more='refiner = { model = "scaled" }\n')
    write_model(tmp_path, "fits", more='refiner = { model = "base" }\n')
    write_model(tmp_path, "scaled", scaling_factor=1.25)
    write_model(tmp_path, "late", more='refiner = { model = "away" }\n')
    write_model(tmp_path, "away", PLAIN.replace('path = "."', f'repo = "some/one", revision = "{"0" * 40}"'))
    (tmp_path / "away" / "vae" / "config.json").unlink()
    ((file, why),) = faults(Registry(read_cards(tmp_path), Settings(models=tmp_path)))
    assert file == tmp_path / "base" / "card.toml" and why.endswith("VAE's scaling_factor is 1.25, not 1.5")


def test_one_that_is_not_downloaded_is_refused_with_the_command_that_gets_it(tmp_path: Path) -> None:
    write_model(tmp_path, "base")
    write_model(tmp_path, "away", PLAIN.replace('path = "."', f'repo = "some/one", revision = "{"0" * 40}"'))
    (tmp_path / "away" / "vae" / "config.json").unlink()
    registry = Registry(read_cards(tmp_path), Settings(models=tmp_path))
    with refused("model_not_downloaded", "away: not downloaded: run `instep models pull away`"):
        job_of(registry, refiner={"model": "away"})


def test_files_that_come_later_are_seen(tmp_path: Path) -> None:
    folder = tmp_path / "models"
    for name in ("base", "late"):
        write_model(folder, name)
    config = folder / "late" / "vae" / "config.json"
    config.rename(config.with_suffix(".part"))
    registry = Registry(read_cards(folder), Settings(models=folder))
    with refused("invalid_value", "config of late's VAE"):
        job_of(registry, refiner={"model": "late"})
    config.with_suffix(".part").rename(config)
    assert recipe(registry, refiner={"model": "late"}).refiner


def test_a_card_with_a_refiner_that_is_not_there_is_skipped(tmp_path: Path) -> None:
    write_model(tmp_path, "base", more='refiner = { model = "gone" }\n')
    write_model(tmp_path, "other")
    cards = read_cards(tmp_path)
    (error,) = cards.skipped.values()
    assert list(cards) == ["other"] and error.message.endswith("base/card.toml: refiner: there is no model gone")


def test_sizes_are_height_first_in_a_recipe(registry: Registry) -> None:
    asked = recipe(registry, size="48x32", original_size="512x256", crop=[3, 4], target_size="640x480")
    assert asked.framing == Framing((256, 512), (4, 3), (480, 640))
    assert recipe(registry, size="48x32").framing is None
    assert recipe(registry, size="48x32", crop=[1, 0]).framing == Framing((32, 48), (0, 1), (32, 48))


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ({"original_size": "512"}, 'original_size: expects "WxH" in pixels'),
        ({"target_size": "0x12"}, 'target_size: expects "WxH" in pixels'),
        ({"target_size": "100000x12"}, 'target_size: expects "WxH" in pixels'),
        ({"original_size": 512}, 'original_size: expects "WxH" in pixels'),
        *(({"crop": wrong}, "crop: expects [left, top]") for wrong in ([1], "1,2", [1, -1], [1.5, 2], [0, 100_000])),
        ({"crop": [1, 2, 3]}, "crop: expects at most 2 entries, not 3"),
    ],
)
def test_sizes_that_are_refused(registry: Registry, fields: dict[str, Any], said: str) -> None:
    with refused("invalid_value") as error:
        job_of(registry, **fields)
    assert error.value.message.startswith(said) and error.value.param == next(iter(fields))


@pytest.mark.parametrize("fields", [{"original_size": "64x64"}, {"crop": [0, 0]}, {"target_size": "64x64"}])
def test_only_some_cards_take_sizes(registry: Registry, fields: dict[str, Any]) -> None:
    assert recipe(registry, **fields).framing
    with refused("invalid_value", ": fine has no network that takes sizes"):
        job_of(registry, "fine", **fields)


def test_the_facts_of_a_job_ask_for_it_again(registry: Registry) -> None:
    sizes = {"original_size": "512x256", "crop": [3, 4], "target_size": "640x480"}
    first = job_of(registry, refiner={"model": "finer"}, **sizes)
    found = recipe_facts(first.request.recipe)
    assert found["refiner"] == {"model": "fine", "switch_at": 0.8} and found.items() >= sizes.items()
    for job in (first, *(job_of(registry, "auto", refiner=one) for one in (None, {"model": "none"}))):
        asked = json.loads(json.dumps(facts(job, [0])))
        again = job_of(registry, asked.pop("model"), **asked)
        assert again.request.recipe == job.request.recipe
    assert not {"refiner", *sizes} & facts(job_of(registry), [0]).keys()
    shown = ImagesReply.model_fields.keys()
    assert found.keys() <= shown


def test_an_absent_negative_prompt_stays_absent_where_that_is_not_an_empty_one(registry: Registry) -> None:
    job = job_of(registry)
    assert facts(job, [0])["negative_prompt"] == ""
    job.card = job.card.model_copy(update={"force_zeros": True})
    assert "negative_prompt" not in facts(job, [0])
    again = job_of(registry, negative_prompt="")
    again.card = job.card
    assert facts(again, [0])["negative_prompt"] == ""
    other = job_of(registry, refiner={"model": "fine"})
    assert facts(other, [0])["negative_prompt"] == "" and other.refiner
    other.refiner = other.refiner.model_copy(update={"force_zeros": True})
    assert "negative_prompt" not in facts(other, [0])


def test_the_line_of_a1111_names_it_as_its_users_know_it(registry: Registry) -> None:
    line = a1111(facts(job_of(registry, refiner={"model": "fine"}), [0])).splitlines()[-1]
    assert ", Model: base, Refiner: fine, Refiner switch at: 0.8" in line
    for job in (job_of(registry), job_of(registry, "auto", refiner={"model": "none"})):
        assert "Refiner" not in a1111(facts(job, [0]))


@pytest.mark.parametrize(
    ("switch_at", "fields", "said"),
    [
        (0.9999, {"num_inference_steps": 4}, ["refiner is ignored: none of 4 steps comes after its switch_at"]),
        (0.0001, {"num_inference_steps": 4}, []),
        (0.2, {"num_inference_steps": 10, "strength": 0.2},
         ["base draws no step: all 2 come after switch_at of refiner"]),
        (0.8, {"num_inference_steps": 10, "partial_images": 3, "stream": True}, []),
        (0.8, {"num_inference_steps": 3, "partial_images": 3, "stream": True},
         ["partial_images: at most 2 come before an image of 3 steps"]),
    ],
)  # fmt: skip
def test_a_switch_that_leaves_a_model_nothing_is_a_warning(
    registry: Registry, switch_at: float, fields: dict[str, Any], said: list[str]
) -> None:
    read = read_edit if "strength" in fields else read_body
    job = job_of(registry, read=read, refiner={"model": "fine", "switch_at": switch_at}, **fields)
    assert warnings(job, []) == said


def test_the_schema_of_a_card_takes_what_the_body_takes(registry: Registry) -> None:
    card = registry.find("base")
    schema = Draft202012Validator(body_schema(card, card.names, True, {}, registry.refiners(card)))
    good = [{"refiner": None}, {"refiner": {"model": "fine"}}, {"refiner": {"model": "none"}}]
    good += [{"refiner": {"model": "shared", "switch_at": 0.3}}, {"original_size": "512x512", "crop": [0, 9]}]
    wrong: list[dict[str, Any]] = [{"refiner": {"model": name}} for name in ("scaled", "base", "")]
    wrong += [{"refiner": {"model": "fine", "switch_at": switch}} for switch in (0, 1, "0.5")]
    wrong += [{"crop": [0]}, {"crop": [0, -1]}, {"original_size": "512"}, {"refiner": {}}]
    for fields in (*good, *wrong):
        assert schema.is_valid({"prompt": "a", **fields}) == (fields in good), fields
    plain = registry.find("fine")
    assert "crop" not in body_schema(plain, plain.names, True)["properties"]
