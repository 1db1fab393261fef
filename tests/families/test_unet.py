"""UNet: conditions from its CLIPs, its card and a request, against transformers; checkpoints that do not fit."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel, CLIPTextModelWithProjection

from app.cards.card import Card
from app.cards.cards import read_cards
from app.cards.folder import ModelFolder
from app.checkpoints.parts import build_family, build_parts
from app.errors import CheckpointError, InvalidValue
from app.families import FAMILIES, UNet
from app.families.components import has_weights, network_of
from app.families.text import TextCache, read_texts, token_ids
from app.request import ClassLabel, Framing, Guidance, Pass, Prompt, Recipe
from tests.families.plain import CPU
from tests.parts.engine import card as one_card
from tests.parts.requests import passes
from tests.parts.tiny_unets import KINDS

TEXTS = ["a red apple", "", "a small yellow flower"]
MODELS = Path(__file__).parents[2] / "models"
NAMES = ("tiny-sd15", "tiny-sd2", "tiny-sdxl", "tiny-refiner")


@pytest.fixture(scope="module")
def cards(unets: Path) -> dict[str, Card]:
    return read_cards(unets)


@pytest.fixture(scope="module")
def parts(cards: dict[str, Card]) -> dict[str, dict[str, Any]]:
    return {name: build_parts(cards[name], cards, CPU, torch.float32) for name in NAMES}


@pytest.fixture(scope="module")
def families(cards: dict[str, Card], parts: dict[str, Any]) -> dict[str, UNet]:
    return {name: build_family(cards[name], parts[name], CPU, torch.float32) for name in NAMES}


def recipe(size: tuple[int, int] = (40, 24), **changes: Any) -> Recipe:
    return Recipe("m", *size, "euler", 4, Guidance(changes.pop("guidance", 4.0)), 24, **changes)


def outputs(folder: Path, tokenizer: Any) -> tuple[Any, Any]:
    """The network of a text encoder's folder, as transformers reads it, and what it makes of the texts."""
    kind = CLIPTextModelWithProjection if folder.name.endswith("_2") else CLIPTextModel
    network = kind.from_pretrained(folder).eval()
    with torch.no_grad():
        return network, network(token_ids(tokenizer, TEXTS, 24), output_hidden_states=True)


@pytest.mark.parametrize("name", ["tiny-sd15", "tiny-sd2"])
@pytest.mark.parametrize("skip", [0, 1, 2])
def test_one_clip_is_its_layer_after_the_last_norm(unets: Path, families: Any, name: str, skip: int) -> None:
    found = families[name].encode([Pass(Prompt(text), (), skip) for text in TEXTS], 24)
    network, wanted = outputs(unets / name / "text_encoder", families[name].encoders["text_encoder"].tokenizer)
    assert found.keys() == {"text"} and found["text"].shape == (3, 24, network.config.hidden_size)
    with torch.no_grad():
        layers = [network.final_layer_norm(layer) for layer in wanted.hidden_states]
    assert torch.allclose(found["text"], layers[-1 - skip], atol=1e-6)
    assert not torch.allclose(found["text"], layers[-2 - skip], atol=1e-2)
    assert skip or torch.allclose(found["text"], wanted.last_hidden_state, atol=1e-6)


@pytest.mark.parametrize("skip", [0, 1])
def test_two_clips_are_their_last_layers_but_one_side_by_side(unets: Path, families: Any, skip: int) -> None:
    sdxl, refiner = families["tiny-sdxl"], families["tiny-refiner"]
    first, second = (
        outputs(unets / "tiny-sdxl" / name, encoder.tokenizer)[1] for name, encoder in sdxl.encoders.items()
    )
    layers = [one.hidden_states[-2 - skip] for one in (first, second)]
    asked = [Pass(Prompt(text), (1.0,) * 6, skip) for text in TEXTS]
    found, refined = sdxl.encode(asked, 24), refiner.encode(asked, 24)
    assert torch.allclose(found["text"], torch.cat(layers, -1), atol=1e-6)
    assert torch.allclose(refined["text"], layers[1], atol=1e-6)
    for one in (found, refined):
        assert torch.allclose(one["pooled"], second.text_embeds, atol=1e-6), "whatever is left out"
        assert one["time_ids"].dtype == torch.float32 and one["time_ids"].shape == (3, 6)


def test_passes_with_and_without_a_text_and_with_other_layers_share_a_call(families: Any) -> None:
    sdxl, texts = families["tiny-sdxl"], []

    def read(encoder: Any, asked: Any, *rest: Any) -> Any:
        texts.extend(asked)
        return read_texts(encoder, asked, *rest)

    numbers = [tuple(float(6 * row + column) for column in range(6)) for row in range(4)]
    conditions = [Prompt("red"), None, Prompt("red"), Prompt("")]
    asked = [Pass(one, own, skip) for one, own, skip in zip(conditions, numbers, (0, 0, 1, 0), strict=True)]
    together = sdxl.encode(asked, 24, read=read)
    assert sorted(texts) == ["", "", *["red"] * 4], "two CLIPs, two layers, and nothing for the pass without a text"
    for row, one in enumerate(asked):
        alone = sdxl.encode([one], 24)
        for name, value in together.items():
            assert torch.allclose(value[row : row + 1], alone[name], atol=1e-6), (row, name)
    assert together["time_ids"].tolist() == [list(row) for row in numbers]
    assert not together["text"][1].any() and not together["pooled"][1].any() and together["text"][3].any()
    assert not torch.allclose(together["text"][0], together["text"][2], atol=1e-2)


def test_numbers_are_never_in_the_cache_of_texts_and_layers_always(families: Any) -> None:
    sdxl, cache = families["tiny-sdxl"], TextCache(1 << 20, lambda network: 0)
    read = partial(cache.read, "tiny-sdxl", ())
    sdxl.encode([Pass(Prompt("red"), (1.0,) * 6)], 24, read=read)
    assert cache.count() == (0, 2)
    sdxl.encode([Pass(Prompt("red"), (2.0,) * 6)], 24, read=read)
    assert cache.count() == (2, 0)
    sdxl.encode([Pass(Prompt("red"), (2.0,) * 6, 1), Pass(None, (2.0,) * 6)], 24, read=read)
    assert cache.count() == (0, 2)


def test_a_line_passes_through_the_network_with_its_sizes(families: Any) -> None:
    framing = Framing((512, 384), (7, 31), (1024, 640))
    red, absent = Prompt("red", "dog"), Prompt("red")
    sd15, sdxl, refiner = (families[name] for name in ("tiny-sd15", "tiny-sdxl", "tiny-refiner"))
    size = (24.0, 40.0, 0.0, 0.0)
    assert sd15.passes(absent, recipe()) == passes([Prompt("red"), Prompt("")])
    assert sdxl.passes(red, recipe(clip_skip=1)) == [
        Pass(Prompt("red"), (*size, 24, 40), 1), Pass(Prompt("dog"), (*size, 24, 40))
    ]  # fmt: skip
    assert sdxl.passes(absent, recipe())[1] == Pass(None, (*size, 24, 40))
    assert sdxl.passes(Prompt("red", ""), recipe())[1].condition == Prompt("")
    assert sdxl.passes(absent, recipe(guidance=1.0)) == [Pass(Prompt("red"), (*size, 24, 40))]
    assert sdxl.passes(red, recipe(framing=framing))[1].numbers == (512, 384, 7, 31, 1024, 640)
    assert refiner.passes(absent, recipe(framing=framing)) == [
        Pass(Prompt("red"), (512, 384, 7, 31, 6.0)), Pass(Prompt(""), (512, 384, 7, 31, 2.5))
    ]  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_a_stand_in_has_the_shapes_of_what_is_encoded(families: Any, name: str) -> None:
    one = families[name]
    encoded, blank = one.encode(one.passes(Prompt("red"), recipe(guidance=0.0)), 24), one.blank(24)
    assert {key: (value.shape, value.dtype) for key, value in encoded.items()} == {
        key: (value.shape, value.dtype) for key, value in blank.items()
    }
    assert not any(value.any() for value in blank.values())


@pytest.mark.parametrize("name", NAMES)
def test_without_its_clips_a_text_is_zeros_of_the_same_shapes(cards: Any, parts: Any, families: Any, name: str) -> None:
    bare = build_family(cards[name], {key: parts[name][key] for key in ("unet", "vae")}, CPU, torch.float32)
    with_them, without = (one.encode(one.passes(Prompt("red"), recipe()), 24) for one in (families[name], bare))
    assert with_them.keys() == without.keys()
    for key, value in with_them.items():
        assert without[key].shape == value.shape
        assert torch.equal(without[key], value) if key == "time_ids" else not without[key].any()


def test_a_network_in_bfloat16_takes_float32_sizes_and_gives_float32(cards: Any) -> None:
    card = cards["tiny-sdxl"]
    half = build_family(card, build_parts(card, cards, CPU, torch.bfloat16), CPU, torch.bfloat16)
    conditions = half.encode(half.passes(Prompt("red"), recipe((1023, 1017))), 24)
    assert conditions["text"].dtype == conditions["pooled"].dtype == torch.bfloat16
    assert conditions["time_ids"][0].tolist() == [1017, 1023, 0, 0, 1017, 1023]
    with torch.inference_mode():
        out, frac = half.denoise(torch.randn(2, 4, 6, 10), torch.tensor([999.0, 12.5]), conditions)
    assert out.dtype == torch.float32 and out.shape == (2, 4, 6, 10) and torch.isfinite(out).all() and frac is None


LACKS: dict[str, tuple[str, Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "one of two CLIPs": ("tiny-sdxl", lambda _: {"text_encoder": None}, "the CLIPs are not together as wide"),
    "the other one": ("tiny-sdxl", lambda _: {"text_encoder_2": None}, "the CLIPs are not together as wide"),
    "a tokenizer": ("tiny-sd15", lambda _: {"tokenizer": None}, "text_encoder needs a tokenizer"),
    "its own VAE": ("tiny-sd15", lambda _: {"vae": _vae()}, "the network has 4 latent channels, the VAE 8"),
    "no picture as input": ("tiny-sd15", lambda _: {"unet": _unet(in_channels=9)}, "9 latent channels"),
    "no classes as input": ("tiny-sd15", lambda _: {"unet": _unet(num_class_embeds=3)}, "takes one of"),
    "SDXL's conditions": (
        "tiny-sdxl", lambda own: {"unet": _unet(own, projection_class_embeddings_input_dim=24 + 4 * 8)}, "not SDXL's"
    ),
    "a card that says so": (
        "tiny-sdxl", lambda own: {"unet": _unet(own, addition_embed_type=None)}, "framing of its card should be false"
    ),
}  # fmt: skip


def _unet(own: dict[str, Any] | None = None, **changes: Any) -> Any:
    """tiny-sd15's U-Net, or `own`, with another config, without weights."""
    with torch.device("meta"):
        return UNet2DConditionModel(**{**KINDS["sdxl" if own else "sd15"].network, **changes})


def _vae() -> Any:
    with torch.device("meta"):
        return AutoencoderKL(latent_channels=8)


@pytest.mark.parametrize("name", LACKS)
def test_parts_that_do_not_fit_are_refused(cards: dict[str, Card], parts: Any, name: str) -> None:
    model, change, reason = LACKS[name]
    with pytest.raises(CheckpointError, match=reason):
        build_family(cards[model], {**parts[model], **change(parts[model])}, CPU, torch.float32)


@pytest.mark.parametrize(("name", "numbers"), [("sd1.5", 0), ("sd2.1", 0), ("sdxl", 6), ("sdxl-refiner", 5)])
def test_the_shipped_configs_fit_together(name: str, numbers: int) -> None:
    """At true size, without weights: with the CLIPs, and without, as in a benchmark."""
    shipped = read_cards(MODELS)
    found = [part for part in ModelFolder(shipped[name], shipped).beside().parts() if has_weights(part.class_name)]
    parts = {part.name: network_of(part.class_name, part.folder) for part in found}
    tokenizers = {one.replace("text_encoder", "tokenizer"): object() for one in parts if one.startswith("text_encoder")}
    whole = build_family(shipped[name], {**parts, **tokenizers}, CPU, torch.bfloat16)
    bare = build_family(shipped[name], {one: parts[one] for one in ("unet", "vae")}, CPU, torch.bfloat16)
    shapes = [{key: value.shape for key, value in one.blank(77).items()} for one in (whole, bare)]
    assert shapes[0] == shapes[1] and shapes[0]["text"][1:] == (77, whole.config.cross_attention_dim)
    assert whole.numbers == bare.numbers == numbers and shapes[0].get("pooled", (1, 1280)) == (1, 1280)
    assert whole.latent_shape(1024, 768) == (4, 96, 128) and whole.latent_shape(520, 512) == (4, 64, 65)


def test_a_card_names_the_network_of_its_family() -> None:
    networks = {family: kind.required[0] for family, kind in FAMILIES.items()}
    assert networks == {family: one_card("one", family=family).network for family in FAMILIES}
    assert set(networks.values()) == {"transformer", "unet"}


def test_a_class_is_refused(families: Any) -> None:
    with pytest.raises(InvalidValue, match="a prompt, not a class label"):
        families["tiny-sd15"].encode(passes([ClassLabel(1)]), 24)
