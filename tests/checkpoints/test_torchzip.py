"""Torch zip: what torch.save wrote is read; bombs, code and files that lie are refused, and cost nothing."""

from __future__ import annotations

import argparse
import copy
import io
import pickle
import random
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from app.checkpoints.tensors import PICKLE_LIMIT, read_torch_zip
from app.errors import CheckpointError
from tests.parts.measured import peak
from tests.parts.tiny_parts import Payload

STATE = {"a.weight": torch.arange(12.0).reshape(3, 4), "a.bias": torch.ones(3, dtype=torch.bfloat16)}


def save(file: Path, content: Any = STATE, **options: Any) -> Path:
    torch.save(content, file, **options)
    return file


def entries(file: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(file) as archive:
        return {info.filename: archive.read(info) for info in archive.infolist()}


def rewrite(file: Path, edit: Callable[[dict[str, bytes]], Any], compression: int = zipfile.ZIP_STORED) -> None:
    held = entries(save(file))
    edit(held)
    with zipfile.ZipFile(file, "w", compression) as archive:
        for name, content in held.items():
            archive.writestr(name, content)


def test_what_the_authors_save(tmp_path: Path) -> None:
    """A state dict as they publish it, and all that their train.py writes, of which the EMA is taken."""
    plain = read_torch_zip(save(tmp_path / "a.pt", OrderedDict(STATE)))
    assert plain.keys() == STATE.keys() and all(torch.equal(plain[key], STATE[key]) for key in STATE)
    worse = {key: value + 1 for key, value in STATE.items()}
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.ones(2))])
    trained = {"model": worse, "ema": STATE, "opt": optimizer.state_dict(), "args": argparse.Namespace(model="DiT-S/8")}
    assert torch.equal(read_torch_zip(save(tmp_path / "b.pt", trained))["a.weight"], STATE["a.weight"])
    assert torch.equal(read_torch_zip(save(tmp_path / "c.pt", {"model": worse}))["a.weight"], worse["a.weight"])
    distributed = {f"module.{key}": value for key, value in STATE.items()}
    assert read_torch_zip(save(tmp_path / "d.pt", distributed)).keys() == STATE.keys()


def overlapping(file: Path) -> None:
    """Ten entries of the directory that are one entry of the file."""
    with zipfile.ZipFile(save(file), "a") as archive:
        storage = next(info for info in archive.filelist if info.filename.endswith("data/0"))
        for number in range(10, 20):
            again = copy.copy(storage)
            again.filename = again.orig_filename = storage.filename.replace("data/0", f"data/{number}")
            again.file_size = again.compress_size = 400
            archive.filelist.append(again)
        archive._didModify = True  # type: ignore[attr-defined]


def named(name: str) -> Callable[[Path], Any]:
    return lambda file: rewrite(file, lambda held: held.update({name: b"x"}))


def legacy(file: Path) -> None:
    save(file, _use_new_zipfile_serialization=False)


def longer(file: Path) -> None:
    file.write_bytes(save(file).read_bytes() + b"PK more")


LIES: dict[str, tuple[Callable[[Path], Any], str]] = {
    "truncated": (lambda f: f.write_bytes(save(f).read_bytes()[:-30]), "not a whole torch zip"),
    "empty": (lambda f: f.write_bytes(b""), "not a whole torch zip"),
    "text": (lambda f: f.write_bytes(b"<html>" * 99), "is a web page, not a checkpoint"),
    "absent": (lambda f: None, "No such file or directory"),
    "old format": (legacy, "not a whole torch zip (torch.save of version 1.6"),
    "a pickle": (lambda f: f.write_bytes(pickle.dumps({"a": Payload(f.parent / "ran")})), "not a whole torch zip"),
    "more at its end": (longer, "not a whole torch zip"),
    "another zip": (lambda f: zipfile.ZipFile(f, "w").writestr("a.txt", "x"), "not one that torch.save wrote"),
    "deflated": (lambda f: rewrite(f, lambda held: None, zipfile.ZIP_DEFLATED), "is compressed"),
    "parent": (named("a/../../evil"), "'a/../../evil' is not the name of an entry"),
    "rooted": (named("/etc/evil"), "'/etc/evil' is not the name of an entry"),
    "another root": (named("b/data/0"), "'b/data/0' is not the name"),
    "backslash": (named("a/..\\evil"), "is not the name of an entry"),
    "overlapping": (overlapping, "they overlap"),
    "a large pickle": (
        lambda f: rewrite(f, lambda held: held.update({"a/data.pkl": bytes(PICKLE_LIMIT + 1)})),
        f"has {PICKLE_LIMIT + 1} bytes, over",
    ),
    "many entries": (
        lambda f: rewrite(f, lambda held: held.update({f"a/data/{n}": b"" for n in range(20_001)})),
        "entries, over 20000",
    ),
    "code": (
        lambda f: save(f, {"a": Payload(f.parent / "ran")}),
        "asks for posix.mkdir, which is not a tensor; nothing",
    ),
    "a module": (lambda f: save(f, torch.nn.Linear(2, 2)), "asks for torch.nn.modules.linear.Linear"),
    "a list": (lambda f: save(f, [torch.ones(2)]), "is a list, not tensors"),
    "nothing": (lambda f: save(f, {}), "is a dict, not tensors"),
    "numbers": (lambda f: save(f, {"a": 1}), "'a' is of type int, not a tensor"),
    "whole numbers": (lambda f: save(f, {"a": torch.ones(2, dtype=torch.int64)}), "a is not a plain tensor"),
    "sparse": (lambda f: save(f, {"a": torch.eye(2).to_sparse()}), "a is not a plain tensor"),
    "no memory": (lambda f: save(f, {"a": torch.empty(9, device="meta")}), "a is not a plain tensor"),
    "one for a billion": (
        lambda f: save(f, {"a": torch.ones(1).expand(10**5, 10**5)}),
        "more than its bytes in the file",
    ),
    "one tensor often": (
        lambda f: save(f, {str(n): view for n, view in enumerate([torch.ones(2**16)] * 64)}),
        "more than its bytes in the file",
    ),
}


@pytest.mark.parametrize("lie", LIES)
def test_a_lie_is_refused_in_one_line(lie: str, tmp_path: Path) -> None:
    file, (spoil, told) = tmp_path / "a.pt", LIES[lie]
    spoil(file)
    with pytest.raises(CheckpointError) as caught:
        read_torch_zip(file)
    assert told in caught.value.message and str(file) in caught.value.message
    assert len(caught.value.message) < 500 and "\n" not in caught.value.message
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a/data/0", "a/data.pkl"])
def test_a_bomb_is_refused_before_it_grows(name: str, tmp_path: Path) -> None:
    """256 MiB of zeros in 260 kB, which weights_only=True alone would let grow."""
    file = tmp_path / "bomb.pt"
    held = entries(save(tmp_path / "a.pt"))
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for other in held.keys() - {name}:
            archive.writestr(other, held[other])
        with archive.open(name, "w") as stream:
            for _ in range(256):
                stream.write(bytes(2**20))
    assert file.stat().st_size < 2**19

    def refused() -> None:
        with pytest.raises(CheckpointError, match="is compressed"):
            read_torch_zip(file)

    assert peak(refused) < 10 * 2**20
    assert peak(lambda: zipfile.ZipFile(file).read(name)) > 2**27, "the measure sees it grow"


def test_spoiled_files_are_refused_or_hold_the_same_names(tmp_path: Path) -> None:
    """400 files with a few other bytes: a CheckpointError or tensors, and nothing else."""
    file, chance, refused = tmp_path / "a.pt", random.Random(3), 0
    stream = io.BytesIO()
    torch.save({"ema": STATE}, stream)
    for _ in range(400):
        spoiled = bytearray(stream.getvalue())
        for _ in range(chance.randint(1, 4)):
            spoiled[chance.randrange(len(spoiled))] = chance.randrange(256)
        file.write_bytes(spoiled)
        try:
            assert all(value.isfinite().numel() < 100 for value in read_torch_zip(file).values())
        except CheckpointError as error:
            refused += 1
            assert str(file) in error.message and len(error.message) < 500
    assert 100 < refused < 400
