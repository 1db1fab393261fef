"""The cache of encoded prompts against its plain twin: a family that encodes every text anew."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import pytest
import torch

from app.engine.row import Row
from app.engine.runner import encode_rows
from app.families.base import Family
from app.families.text import TextCache, cut_text
from app.pool.pool import Pool
from app.request import ClassLabel, Prompt
from tests.engine.texts import Plain, anew, encoders, equal, forwards, row
from tests.parts.close import FORWARD, apart, close
from tests.parts.tiny_parts import WORDS

AMPLE = 10**9


def fresh(budget: int) -> TextCache:
    return TextCache(budget, lambda network: 1)


@pytest.fixture(autouse=True)
def inference(one_thread: None) -> Iterator[None]:
    with torch.inference_mode():
        yield


@pytest.fixture
def sd3(tiny_pool: Pool) -> Family:
    family = tiny_pool.family("tiny-sd3")
    assert family is not None
    return family


def test_what_is_kept_is_what_was_encoded_bit_for_bit(sd3: Family) -> None:
    encodings, texts = fresh(AMPLE), ["red apple", "", "a cat and a dog", "moon"]
    theirs = anew(sd3, texts)
    with forwards(sd3) as seen:
        first = encode_rows(sd3, [row(text) for text in texts], None, encodings)
        again = encode_rows(sd3, [row(text) for text in reversed(texts)], None, encodings)
        alone = [encode_rows(sd3, [row(text)], None, encodings)[0] for text in texts]
    assert seen == [4, 4, 4], "each encoder, all four in one batch, once"
    for place in range(4):
        expected = {name: value[place : place + 1] for name, value in theirs.items()}
        assert equal(first[place], expected) and equal(again[3 - place], expected) and equal(alone[place], expected)
    assert encodings.count() == (24, 12) and encodings.count() == (0, 0)


def test_only_what_is_missing_is_encoded_each_text_once(sd3: Family) -> None:
    encodings = fresh(AMPLE)
    encode_rows(sd3, [row("red", guided=True)], None, encodings)
    rows = [row(text, guided=True) for text in ("red", "blue", "green", "blue")]
    with forwards(sd3) as seen:
        encode_rows(sd3, rows, None, encodings)
    assert seen == [2, 2, 2] and encodings.count() == (3 * 2, 3 * 2 + 3 * 2)
    with forwards(sd3) as seen:
        encode_rows(sd3, [row("red", length=30)], None, encodings)
    assert seen == [1], "the CLIPs' length is the card's, whatever the T5's is"
    assert encodings.count() == (2, 1)


def test_a_rows_conditions_are_its_own_and_what_it_is_guided_away_from(sd3: Family) -> None:
    encodings = fresh(AMPLE)
    one, other = Prompt("red apple", negative="green dog"), Prompt("green dog", negative="red apple")
    with forwards(sd3) as seen:
        rows = [row(one, guided=True), row(other, guided=True), row(one), row("moon", guided=True)]
        ours = encode_rows(sd3, rows, 8, encodings)
    assert seen == [8, 8, 8]
    expected = (["red apple", "green dog"], ["green dog", "red apple"], ["red apple"], ["moon", ""])
    for conditions, texts in zip(ours, expected, strict=True):
        assert equal(conditions, anew(sd3, texts, batch=8))


def test_class_labels_pass_through(tiny_pool: Pool) -> None:
    family, encodings = tiny_pool.family("tiny-dit"), fresh(AMPLE)
    assert family is not None
    guided, plain = encode_rows(
        family, [row(ClassLabel(3), "tiny-dit", guided=True), row(ClassLabel(7), "tiny-dit")], 8, encodings
    )
    assert guided["label"].tolist() == [3, 10] and plain["label"].tolist() == [7]
    assert encodings.bytes == 0 and encodings.count() == (0, 0)


def test_a_thousand_prompts_of_any_length_within_the_budget(sd3: Any) -> None:
    """Hits, misses and bytes are those of the plain rule at every batch; the empty prompt is never encoded again."""
    budget, dice, words, asked = 120_000, random.Random(1), WORDS.split(), 0
    encodings, plain, counted = fresh(budget), Plain(budget), [0, 0]
    batches = [(24, [""])]
    while asked < 1000:
        length = dice.choice((8, 16, 24, 24, 24, 48, 64))
        texts = [" ".join(dice.choices(words, k=dice.choice((1, 1, 1, 2, 30)))) for _ in range(dice.randrange(1, 12))]
        batches.append((length, texts))
        asked += len(texts)
    for length, texts in batches:
        encode_rows(sd3, [row(text, length=length) for text in texts], None, encodings)
        for encoder in encoders(sd3):
            own = length if encoder is sd3.t5 else 24
            size = 4 * 48 * own if encoder is sd3.t5 else 4 * encoder.network.config.hidden_size * (own + 1)
            plain.ask(encoder, texts, own, size)
        counted = [total + more for total, more in zip(counted, encodings.count(), strict=True)]
        assert (*counted, encodings.bytes) == (plain.hits, plain.misses, plain.bytes)
        assert 0 < encodings.bytes <= budget
    assert plain.hits > 200 and plain.misses > 1000
    stores = [state.untyped_storage() for states in encodings.kept.values() for state in states]
    assert sum(store.nbytes() for store in stores) == encodings.bytes, "no batch is held by a part of it"
    with forwards(sd3) as seen:
        (ours,) = encode_rows(sd3, [row("")], None, encodings)
    assert not seen and equal(ours, anew(sd3, [""]))


def test_random_batches_are_each_text_encoded_anew(sd3: Family) -> None:
    """With a budget that keeps half: in deterministic mode bit for bit, whoever was encoded beside it."""
    dice, texts = random.Random(2), ["", "red", "blue moon", "a cat and a dog", "sun", "white star"]
    for batch in (8, None):
        encodings = fresh(25_000)
        alone = {text: anew(sd3, [text], batch=batch) for text in texts}
        for _ in range(30):
            chosen = dice.choices(texts, k=dice.randrange(1, 6))
            for text, ours in zip(
                chosen, encode_rows(sd3, [row(text) for text in chosen], batch, encodings), strict=True
            ):
                for name in ours:
                    assert batch is None or torch.equal(ours[name], alone[text][name])
                    close(ours[name], alone[text][name], FORWARD)
        apart(alone["red"]["text"], alone["sun"]["text"], FORWARD, of="another text:")
        hits, misses = encodings.count()
        assert hits > 30 and misses > 30


def test_a_prompt_wider_than_the_budget_is_kept_while_it_is_needed(sd3: Family) -> None:
    encodings = fresh(0)
    rows = [row("a red apple", guided=True), row("moon")]
    for _ in range(2):
        ours = encode_rows(sd3, rows, 8, encodings)
        assert equal(ours[0], anew(sd3, ["a red apple", ""], batch=8)) and equal(ours[1], anew(sd3, ["moon"], batch=8))
    empty = sum(value.nbytes for value in anew(sd3, [""]).values())
    assert 0 < encodings.bytes <= empty, "the empty prompt stays, before it is padded to the network's width"
    assert encodings.count() == (3, 6 + 9)


def test_the_empty_prompt_stays_at_one_length_alone(sd3: Family) -> None:
    """A client may ask for any: at every length it would fill the budget for good."""
    encodings = fresh(0)
    for length in (24, 30, 40, 24):
        encode_rows(sd3, [row("", length=length)], None, encodings)
        assert encodings.bytes == 4 * (25 * (16 + 24) + length * 48)


def test_cards_that_share_encoders_share_what_they_gave(tiny_pool: Pool, sd3: Family) -> None:
    """Nothing is dropped before the last of them is forgotten, and then all of it."""
    turbo, without = tiny_pool.family("tiny-sd3-turbo"), tiny_pool.family("tiny-sd3-no-t5")
    assert turbo is not None and without is not None
    encodings = fresh(AMPLE)
    first = encode_rows(sd3, [row("red apple", guided=True)], None, encodings)[0]
    with forwards(sd3) as seen:
        again = encode_rows(turbo, [row("red apple", "tiny-sd3-turbo", guided=True)], None, encodings)[0]
        part = encode_rows(without, [row("red apple", "tiny-sd3-no-t5", guided=True)], None, encodings)[0]
    assert not seen and equal(again, first) and encodings.count() == (6 + 4, 6)
    assert torch.equal(part["text"][:, :24], first["text"][:, :24]) and not part["text"][:, 24:].any()
    held = encodings.bytes
    encodings.forget("tiny-sd3")
    encodings.forget("tiny-dit")
    assert encodings.bytes == held
    encodings.forget("tiny-sd3-turbo")
    assert encodings.bytes == 2 * 4 * 25 * (16 + 24), "the T5's are nobody's any more"
    encodings.forget("tiny-sd3-no-t5")
    assert encodings.bytes == 0
    encode_rows(sd3, [row("red apple")], None, encodings)
    assert encodings.count() == (0, 3)


def test_an_encoder_whose_weights_are_others_is_asked_again(sd3: Any) -> None:
    versions = {one.network: 1 for one in encoders(sd3)}
    encodings, t5 = TextCache(AMPLE, versions.__getitem__), sd3.t5.network
    before = encode_rows(sd3, [row("red", guided=True)], 8, encodings)[0]
    held, weight = encodings.bytes, t5.shared.weight
    with torch.inference_mode(False):
        kept = weight.clone()
        weight.mul_(-1.5)
    assert equal(encode_rows(sd3, [row("red", guided=True)], 8, encodings)[0], before) and encodings.count() == (6, 6)
    versions[t5] = 2
    after = encode_rows(sd3, [row("red", guided=True)], 8, encodings)[0]
    assert encodings.count() == (4, 2) and encodings.bytes == held, "the CLIPs' stayed"
    assert equal(after, anew(sd3, ["red", ""], batch=8)) and not equal(after, before)
    with torch.inference_mode(False):
        weight.copy_(kept)


def test_what_no_encoder_sees_is_told_again_without_looking(sd3: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    looked: list[str] = []
    monkeypatch.setattr("app.families.text.cut_text", lambda *args: looked.append(args[1]) or cut_text(*args))
    encodings = fresh(0)

    def cuts(one: Row) -> list[str | None]:
        both = sd3.passes(one.condition, one.request.recipe)
        return [sd3.truncated(each.condition, one.key.text_length, encodings.cut) for each in both]

    long = Prompt("a red Cat and the " * 5 + "End.", negative="moon")
    for _ in range(2):
        assert cuts(row(long, length=23)) == ["Cat and the End."]
        assert cuts(row(long, length=60)) == [None]
        assert cuts(row("red apple")) == [None]
    assert len(looked) == 3 * 3 - 2, "the CLIPs' length is the card's, whatever the T5's is"
    encodings.forget("tiny-sd3")
    assert cuts(row(long, length=23)) == ["Cat and the End."] and len(looked) == 3 * 3 - 2 + 3
