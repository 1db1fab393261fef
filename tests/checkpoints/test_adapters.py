"""A folder of LoRA files: what fits is found for every card, what is wrong is refused by name, and the others fit."""

from __future__ import annotations

import json
import os
import pickle
import random
import re
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import TypeAdapter
from safetensors.torch import save, save_file

from app.cards.adapters import Adapter, Fit
from app.cards.cards import Cards, read_cards
from app.checkpoints.adapters import networks_of, read_adapter, survey
from app.errors import CheckpointError
from tests.families.test_lora import ALONE, REFUSED
from tests.parts.endless import make_endless
from tests.parts.measured import peak
from tests.parts.originals import State
from tests.parts.tiny import write_dit, write_flux, write_sd3
from tests.parts.tiny_parts import Payload

TO_Q = "transformer.transformer_blocks.0.attn.to_q"
TEXT = "text_encoder.text_model.encoder.layers.0.self_attn.q_proj"


def pair(module: str, width: int, rank: int = 2) -> State:
    return {
        f"{module}.lora_A.weight": torch.full((rank, width), 0.25),
        f"{module}.lora_B.weight": torch.full((width, rank), 0.5),
    }


MOST = 48 * 2**20
"""Bytes of memory; 5 MB were measured."""

GOOD = pair(TO_Q, 32) | pair(TEXT, 16, rank=4)
GOOD_FIT = Fit(rank=4, modules=2, parts=("text_encoder", "transformer"), bytes=4 * 2 * (2 * 32 + 4 * 16))


@pytest.fixture(scope="module")
def cards(tmp_path_factory: pytest.TempPathFactory) -> Cards:
    folder = tmp_path_factory.mktemp("cards")
    write_sd3(folder / "sd3", name="sd3")
    write_flux(folder / "flux", dev=True)
    write_dit(folder / "dit")
    return read_cards(folder)


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "loras").mkdir()
    yield tmp_path / "loras"
    for file in tmp_path.rglob("*"):  # whoever waits for a pipe still is let go
        if file.is_fifo():
            os.close(os.open(file, os.O_RDWR))


def header(file: Path, content: Any, data: bytes = b"") -> None:
    raw = content if isinstance(content, bytes) else json.dumps(content).encode()
    file.write_bytes(struct.pack("<Q", len(raw)) + raw + data)


def entry(start: int, end: int, shape: tuple[int, ...] = (2,), dtype: str = "F32") -> dict[str, Any]:
    return {"dtype": dtype, "shape": list(shape), "data_offsets": [start, end]}


def test_a_file_for_one_model_does_not_fit_what_takes_the_less_part(cards: Cards, folder: Path) -> None:
    """Where no model takes all, that is a fit, with what has no place there."""
    module = "transformer.transformer_blocks.0.ff.net.2"
    both = {f"{module}.lora_A.weight": torch.ones(2, 128), f"{module}.lora_B.weight": torch.ones(32, 2)}
    half = both | pair(TO_Q, 32)
    most = half | pair(TO_Q.replace("to_q", "add_q_proj"), 32)
    for name, file in (("all", both), ("half", half), ("most", most), ("none", most | {"other.alpha": torch.ones(1)})):
        save_file(file, folder / f"{name}.safetensors")
    found = {one.name: [*one.fits] for one in survey(folder, cards)}
    assert found == {
        "all": ["tiny-dit", "sd3"],
        "half": ["tiny-dit", "sd3"],
        "most": ["sd3"],
        "none": ["tiny-dit", "sd3"],
    }


def test_what_fits_which_card(cards: Cards, folder: Path) -> None:
    flux = "transformer.single_transformer_blocks.0.attn.to_q"
    save_file(GOOD, folder / "watercolor.safetensors")
    (folder / "watercolor.toml").write_text('description = "Wet."\ntrigger_words = ["wtrclr"]\n')
    save_file(pair(flux, 48) | {"other.alpha": torch.ones(1)}, folder / "b.safetensors")
    save_file(pair("transformer.transformer_blocks.0.attn1.to_k", 32), folder / "c.safetensors")
    (folder / "README.md").write_text("no adapter")
    found = survey(folder, cards)
    assert [one.name for one in found] == ["b", "c", "watercolor"]
    assert [one.problem for one in found] == ["", "", ""]
    assert found[0].fits == {
        "flux": Fit(rank=2, modules=1, parts=("transformer",), bytes=4 * 2 * 2 * 48, unmatched=("other.alpha",))
    }
    assert [*found[1].fits] == ["tiny-dit"]
    assert found[2].fits == {"sd3": GOOD_FIT}
    assert (found[2].description, found[2].trigger_words) == ("Wet.", ("wtrclr",))
    assert survey(folder, cards, whole=True) == found
    # The file's stamp tells of another one in its place.
    save_file(GOOD, folder / "c.safetensors")
    again = survey(folder, cards)
    assert (again[0], again[2]) == (found[0], found[2]) and again[1].stamp != found[1].stamp


@pytest.mark.slow
def test_shipped_cards_need_no_download(folder: Path) -> None:
    """Their configs are beside the cards."""
    models = read_cards(Path(__file__).parent.parent.parent / "models")
    fits = {
        "a": (pair("lora_unet_double_blocks_18_img_attn_proj", 3072), ["flux.1-dev", "flux.1-schnell"]),
        "b": (pair("transformer.transformer_blocks.37.attn.to_q", 2432), ["sd3.5-large", "sd3.5-large-turbo"]),
        "c": (pair("transformer.transformer_blocks.12.attn2.to_q", 1536), ["sd3.5-medium"]),
    }
    for name, (state, _) in fits.items():
        save_file(state, folder / f"{name}.safetensors")
    assert {one.name: sorted(one.fits) for one in survey(folder, models)} == {n: ids for n, (_, ids) in fits.items()}


def test_read_adapter_is_the_file(cards: Cards, folder: Path) -> None:
    file = folder / "a.safetensors"
    settings = {"lora_adapter_metadata": json.dumps({"transformer.lora_alpha": 6.0})}
    save_file(GOOD, file, metadata=settings)
    networks = networks_of(cards["sd3"], cards)
    found = read_adapter(file, networks).pairs
    down, up = found["transformer", "transformer_blocks.0.attn.to_q"]
    assert torch.equal(down, GOOD[f"{TO_Q}.lora_A.weight"]) and torch.equal(up, 3 * GOOD[f"{TO_Q}.lora_B.weight"])
    file.write_bytes(b"\xff" * file.stat().st_size)
    assert torch.equal(down, GOOD[f"{TO_Q}.lora_A.weight"]), "no map of the file"


def test_numbers_that_are_not_finite(cards: Cards, folder: Path) -> None:
    """Headers cannot show them: the check of `instep loras check` does, and a load."""
    file = folder / "a.safetensors"
    save_file({**GOOD, f"{TO_Q}.alpha": torch.tensor(float("inf"))}, file)
    save_file(pair(TO_Q, 32), folder / "b.safetensors")
    assert [one.problem for one in survey(folder, cards)] == ["", ""]
    bad, good = survey(folder, cards, whole=True)
    assert "alpha that is not a number" in bad.problem and str(file) in bad.problem and not bad.fits
    assert good.fits and not good.problem
    with pytest.raises(CheckpointError, match=r"a\.safetensors: .*alpha that is not a number"):
        read_adapter(file, networks_of(cards["sd3"], cards))


def test_each_card_says_why_not(cards: Cards, folder: Path) -> None:
    save_file(pair("lora_unet_double_blocks_0_img_attn_proj", 96), folder / "a.safetensors")
    (found,) = survey(folder, cards)
    assert "is a LoRA of FLUX.1" in found.problem and "(tiny-dit, sd3)" in found.problem
    assert "is for a width of 96, this network has 48 (flux)" in found.problem
    assert survey(folder, {})[0].problem.endswith("no model is here")


def test_a_card_without_configs_leaves_the_others(cards: Cards, folder: Path, tmp_path: Path) -> None:
    save_file(GOOD, folder / "a.safetensors")
    broken = cards["flux"].model_copy(update={"folder": tmp_path, "id": "broken"})
    (found,) = survey(folder, {**cards, "broken": broken})
    assert [*found.fits] == ["sd3"]


def test_one_file(cards: Cards, folder: Path) -> None:
    save_file(GOOD, folder / "a.safetensors")
    save_file(GOOD, folder / "b.safetensors")
    assert [one.name for one in survey(folder / "b.safetensors", cards)] == ["b"]


@pytest.mark.parametrize("name", ["none", "none.safetensors"])
def test_a_place_that_is_not_there(cards: Cards, folder: Path, name: str) -> None:
    with pytest.raises(CheckpointError, match=f"loras/{name}: No such file"):
        survey(folder / name, cards)


def write_names(folder: Path) -> dict[str, str]:
    """Files that fit, with names that cannot be used."""
    names = ["a b", ".hidden", "-a", "ä", "a" * 65, "a\nb", os.fsdecode(b"a\xff"), "a,b", "a%2f", "'", "a=b", "._a"]
    for name in names:
        save_file(GOOD, folder / f"{name}.safetensors")
    return {f"{name}.safetensors": "cannot be a name" for name in names}


def write_contents(folder: Path) -> dict[str, str]:
    """What people have in place of a file."""
    whole = save(GOOD)
    lfs = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12345\n"
    contents: dict[str, tuple[bytes, str]] = {
        "page": (b"<!DOCTYPE html><html><body>Sign in</body></html>", "a web page"),
        "page2": (b"\n <html><head>", "a web page"),
        "lfs": (lfs, "a Git LFS pointer to a file of 12345 bytes"),
        "gguf": (b"GGUF" + bytes(64), "a GGUF file"),
        "gzip": (b"\x1f\x8b\x08" + bytes(64), "a compressed archive"),
        "seven": (b"7z\xbc\xaf\x27\x1c" + bytes(64), "a compressed archive"),
        "pickle": (pickle.dumps({"a": Payload(folder / "ran")}), "a torch file, whatever its name says"),
        "text": (b"This is not a checkpoint at all.", "a text, not a checkpoint"),
        "json": (b'{"error": "not found, or not yours"}', "a text, not a checkpoint"),
        "empty": (b"", "an empty file"),
        "short": (b"\x01", "truncated"),
        "zeros": (bytes(1000), "not a whole safetensors file"),
        "tail": (whole + b"x", "not a whole safetensors file"),
    }
    for length in range(8, len(whole), len(whole) // 30):
        contents[f"cut{length}"] = (whole[:length], "trunc|not a whole|a header")
    for name, (content, _) in contents.items():
        (folder / f"{name}.safetensors").write_bytes(content)
    with zipfile.ZipFile(folder / "zip.safetensors", "w") as archive:
        archive.writestr("archive/data.pkl", b"")
    return {f"{name}.safetensors": words for name, (_, words) in contents.items()} | {"zip.safetensors": "a torch file"}


def write_headers(folder: Path) -> dict[str, str]:
    """Headers that lie, or cost memory."""
    key = f"{TO_Q}.lora_A.weight"
    other, half = f"{TO_Q}.lora_B.weight", 4 * 32 * 2000
    one = json.dumps(entry(0, 8))
    written: dict[str, tuple[Any, bytes, str]] = {
        "twice": (f'{{"{key}": {one}, "{key}": {one}}}'.encode(), bytes(8), "a key twice|not a whole"),
        "many": ({f"x.{number}": entry(0, 0, (0,)) for number in range(21_000)}, b"", "over 20000 tensors"),
        "overlap": ({"a": entry(0, 8), "b": entry(4, 12)}, bytes(12), "not a whole"),
        "hole": ({"a": entry(0, 8), "b": entry(12, 20)}, bytes(20), "not a whole"),
        "backwards": ({"a": entry(8, 0)}, bytes(8), "not a whole"),
        "far": ({"a": entry(0, 2**40, (2**38,))}, bytes(8), "not a whole"),
        "overflow": ({"a": entry(0, 8, (2**62, 2**62))}, bytes(8), "not a whole"),
        "negative": ({"a": entry(0, 8, (-2,))}, bytes(8), "not a whole"),
        "wrong": ({"a": entry(0, 8, (3,))}, bytes(8), "not a whole"),
        "eight": ({key: entry(0, 64, (2, 32), "F8_E4M3")}, bytes(64), r"number format F8_E4M3 \(8-bit floats\)"),
        "unknown": ({key: entry(0, 64, (2, 32), "F7")}, bytes(64), "not a whole"),
        "list": ([1, 2], b"", "not a whole|is "),
        "deep": (b'{"a":' + b"[" * 100_000, b"", "not a whole"),
        "metadata": ({"__metadata__": {"a": 1}, "a": entry(0, 8)}, bytes(8), "not a whole"),
        "no key": ({"": entry(0, 8)}, bytes(8), "is no LoRA of this model"),
        "long key": ({"x" * 2**20: entry(0, 8)}, bytes(8), "names of over 256 characters"),
        "lines": ({"a\nb\nc": entry(0, 8)}, bytes(8), "is no LoRA of this model"),
        "no numbers": ({}, b"", "is no LoRA of this model"),
        "many without a place": ({f"x{i}.alpha": entry(0, 0, (0,)) for i in range(2000)}, b"", "have no place"),
        "rank": ({key: entry(0, half, (2000, 32)), other: entry(half, 2 * half, (32, 2000))}, bytes(2 * half), "2000"),
        "settings": ({"__metadata__": {"lora_adapter_metadata": "{"}, "a": entry(0, 8)}, bytes(8), "not peft's"),
    }  # fmt: skip
    for name, (content, data, _) in written.items():
        header(folder / f"{name.replace(' ', '-')}.safetensors", content, data)
    for name, length in (("huge", 2**30), ("endless", 2**63), ("negative-header", 2**64 - 1)):
        with (folder / f"{name}.safetensors").open("wb") as stream:
            stream.write(struct.pack("<Q", length))
            stream.truncate(min(length, 2**30) + 8)
    found = {f"{name.replace(' ', '-')}.safetensors": words for name, (_, _, words) in written.items()}
    return found | dict.fromkeys(
        ("huge.safetensors", "endless.safetensors", "negative-header.safetensors"), "a header of|truncated"
    )


def write_special(folder: Path) -> dict[str, str]:
    """What is no regular file, and files of other formats."""
    for kind in ("pipe", "device", "terabyte"):
        make_endless(folder / f"{kind}.safetensors", kind)
    (folder / "folder.safetensors").mkdir()
    save_file(GOOD, folder / "folder.safetensors" / "model.safetensors")
    (folder / "nowhere.safetensors").symlink_to(folder / "gone")
    (folder / "loop.safetensors").symlink_to(folder / "loop.safetensors")
    for ending in ("pt", "ckpt", "bin", "pth"):
        (folder / f"old.{ending}").write_bytes(pickle.dumps({"a": Payload(folder / "ran")}))
    words = dict.fromkeys(("pipe", "device", "folder"), "not a regular file")
    words |= {"terabyte": "not a whole|truncated", "nowhere": "No such file", "loop": "Too many levels"}
    found = {f"{name}.safetensors": why for name, why in words.items()}
    return found | {f"old.{ending}": "only safetensors are loaded" for ending in ("pt", "ckpt", "bin", "pth")}


def write_notes(folder: Path) -> dict[str, str]:
    """Files that fit, each with a bad TOML beside it."""
    notes: dict[str, tuple[bytes, str]] = {
        "unknown": (b'triger_words = ["a"]', "triger_words: unknown field"),
        "name": (b'name = "b"', "name: unknown field"),
        "fits": (b"fits = {}", "fits: unknown field"),
        "problem": (b'problem = "x"', "problem: unknown field"),
        "file": (b'file = "/etc/passwd"', "file: unknown field"),
        "number": (b"description = 3", "description: "),
        "word": (b'trigger_words = "a"', "trigger_words: "),
        "numbers": (b"trigger_words = [1]", "trigger_words: "),
        "broken": (b"description = ", "n-broken.toml: "),
        "utf16": ("description = 'a'".encode("utf-16"), "n-utf16.toml: "),
        "long": (b"#" * 70_000, "over 65536 bytes"),
        "deep": (b"a = " + b"[" * 30_000, "n-deep.toml: "),
    }
    for name, (content, _) in notes.items():
        (folder / f"n-{name}.toml").write_bytes(content)
    make_endless(folder / "n-pipe.toml", "pipe")
    make_endless(folder / "n-device.toml", "device")
    (folder / "n-folder.toml").mkdir()
    (folder / "n-nowhere.toml").symlink_to(folder / "gone")
    words = {name: why for name, (_, why) in notes.items()} | {"nowhere": "n-nowhere.toml: .*No such file"}
    words |= dict.fromkeys(("pipe", "device", "folder"), "not a regular file")
    for name in words:
        save_file(GOOD, folder / f"n-{name}.safetensors")
    return {f"n-{name}.safetensors": why for name, why in words.items()}


SEEN_BY_NUMBERS = ("alpha not finite", "alpha infinite", "not finite", "up not finite", "too large with alpha")


def write_others(folder: Path) -> dict[str, str]:
    """Adapters of other kinds, families and sizes, and pairs that are not whole."""
    bare = pair(TO_Q, 32)
    cases = {name: (bare | added, words) for name, (added, words) in REFUSED.items() if name not in SEEN_BY_NUMBERS}
    found = {}
    for number, (state, words) in enumerate({**cases, **ALONE}.values()):
        save_file({key: value.contiguous() for key, value in state.items()}, folder / f"o{number}.safetensors")
        found[f"o{number}.safetensors"] = words
    for width in range(33, 99):
        if width != 48:
            save_file(pair("transformer.transformer_blocks.1.attn.to_v", width), folder / f"w{width}.safetensors")
            found[f"w{width}.safetensors"] = f"is for a width of {width}, this network has 32"
    return found


WRITERS: tuple[Callable[[Path], dict[str, str]], ...] = (
    write_names,
    write_contents,
    write_headers,
    write_special,
    write_notes,
    write_others,
)


@pytest.mark.slow
def test_two_hundred_wrong_files_are_refused_by_name_and_others_fit(cards: Cards, folder: Path) -> None:
    for name in ("000", "mmm", "zzz"):
        save_file(GOOD, folder / f"{name}.safetensors")
    survey(folder, cards)  # once before memory is measured
    expected: dict[str, str] = {}
    for write in WRITERS:
        expected |= write(folder)
    assert len(expected) >= 200
    found: list[Adapter] = []
    taken = peak(lambda: found.extend(survey(folder, cards)))
    assert taken < MOST, "one file is a terabyte, one header a gigabyte"
    with (folder / "huge.safetensors").open("rb") as stream:
        assert peak(lambda: stream.read(11 * MOST)) > 10 * MOST
    good = {one.name: one.fits for one in found if not one.problem}
    assert good == {name: {"sd3": GOOD_FIT} for name in ("000", "mmm", "zzz")}
    bad = {one.file.name: one for one in found if one.problem}
    assert len(bad) == len(expected)
    for name, words in expected.items():
        one = bad[name.encode("utf-8", "backslashreplace").decode()]
        assert not one.fits, name
        assert re.search(words, one.problem), (words, one.problem)
        assert str(folder) in one.problem and len(one.problem) < 2000, one.problem
    assert not (folder / "ran").exists()
    TypeAdapter(list[Adapter]).validate_json(TypeAdapter(list[Adapter]).dump_json(found))


def test_mutated_headers_are_refused_or_fit(cards: Cards, folder: Path) -> None:
    """300 files with a few bytes of the header changed: a problem with their name, or a fit, and nothing else."""
    raw, chance = save(GOOD, {"lora_adapter_metadata": '{"transformer.lora_alpha": 2}'}), random.Random(5)
    end = 8 + struct.unpack("<Q", raw[:8])[0]
    for number in range(300):
        spoiled = bytearray(raw)
        for _ in range(chance.randint(1, 3)):
            spoiled[chance.randrange(end)] = chance.randrange(256)
        (folder / f"m{number}.safetensors").write_bytes(spoiled)
    found = survey(folder, cards, whole=True)
    assert len(found) == 300
    assert all(bool(one.fits) != bool(one.problem) for one in found)
    assert all(str(one.file) in one.problem for one in found if one.problem)
    assert 100 < sum(bool(one.problem) for one in found) < 300
    assert not [one.problem for one in found if "cannot be read (" in one.problem]


@pytest.mark.slow
def test_the_process_of_the_front(cards: Cards, folder: Path) -> None:
    """A pickle goes in and JSON comes out."""
    save_file(GOOD, folder / "a.safetensors")
    write_special(folder)
    process = subprocess.Popen(
        [sys.executable, "-m", "app.checkpoints.adapters"], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    )
    made, _ = process.communicate(pickle.dumps((folder, dict(cards))))
    assert process.returncode == 0
    assert TypeAdapter(list[Adapter]).validate_json(made) == survey(folder, cards)
