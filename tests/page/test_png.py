"""The request inside a picture, read by app/page/png.js."""

from __future__ import annotations

import json
import struct
import time
import zlib
from base64 import b64encode
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from playwright.sync_api import Page

from app.imaging import FORMATS, Format, a1111, encode_image
from app.samplers.table import SAMPLERS
from tests.page.modules import run

pytestmark = pytest.mark.slow


def read(page: Page, file: bytes, function: str = "readPng", kind: str = "image/png") -> dict[str, Any]:
    words = f"""
      const bytes = Uint8Array.from(atob(given), (letter) => letter.charCodeAt(0));
      return m.{function}(new Blob([bytes], {{ type: "{kind}" }}));
    """
    return run(page, "png", words, b64encode(file).decode())


def png_with(texts: PngInfo) -> bytes:
    out = BytesIO()
    Image.new("RGB", (4, 4)).save(out, "png", pnginfo=texts)
    return out.getvalue()


FACTS = {
    "model": "tiny-text",
    "prompt": 'a "red" <b>fox</b> & ünï \\ 🦊\n$HOME `x`\x01',
    "negative_prompt": "blur",
    "seed": 2**53 - 1,
    "size": "64x64",
    "sampler": "dpmpp_2m",
    "schedule": "karras",
    "num_inference_steps": 20,
    "guidance_scale": 7.5,
}
PIXELS = np.zeros((8, 8, 3), np.uint8)


@pytest.mark.parametrize("format", ["png", "jpeg", "webp"])
def test_a_picture_of_this_server_has_its_request(tab: Page, format: Format) -> None:
    found = read(tab, encode_image(PIXELS, format, None, FACTS), "readFacts")
    assert found == {"facts": FACTS, "parameters": a1111(FACTS)}


def test_a_picture_without_a_request_has_none(tab: Page) -> None:
    for format in ("png", "jpeg", "webp"):
        assert read(tab, encode_image(PIXELS, format, None, {}), "readFacts") == {"facts": None, "parameters": None}


@pytest.mark.parametrize("chunk", ["tEXt", "zTXt", "iTXt", "iTXt compressed"])
def test_every_kind_of_text_chunk_is_read(tab: Page, chunk: str) -> None:
    texts = PngInfo()
    texts.add_text("Comment", "another one")
    for name, text in {"instep": json.dumps(FACTS), "parameters": "a naïve fox\nSteps: 3"}.items():
        if chunk.startswith("iTXt"):
            texts.add_itxt(name, text, "en", "übersetzt", zip="compressed" in chunk)
        else:
            texts.add_text(name, text, zip=chunk == "zTXt")
    assert read(tab, png_with(texts)) == {"facts": FACTS, "parameters": "a naïve fox\nSteps: 3"}


A1111 = """a fox, (masterpiece:1.2),
<lora:ink:0.8>
Negative prompt: blurry, low quality
bad hands
Steps: 28, Sampler: {sampler}, CFG scale: 6.5, Seed: 1234567890, Size: 512x768, Model hash: 1a, Model: "a, b: c", \
Clip skip: 2, Version: v1.10.0"""


def test_the_text_of_a1111_is_read_as_a_body(tab: Page) -> None:
    texts = PngInfo()
    texts.add_text("parameters", A1111.format(sampler="DPM++ 2M, Schedule type: Karras"))
    assert read(tab, png_with(texts))["facts"] == {
        "prompt": "a fox, (masterpiece:1.2),\n<lora:ink:0.8>",
        "negative_prompt": "blurry, low quality\nbad hands",
        "num_inference_steps": 28,
        "guidance_scale": 6.5,
        "seed": 1234567890,
        "size": "512x768",
        "sampler": "dpmpp_2m",
        "schedule": "karras",
    }


def sampler_read(page: Page, name: str) -> tuple[str | None, str | None]:
    texts = PngInfo()
    texts.add_text("parameters", f"a fox\nSteps: 28, Sampler: {name}, Seed: 1")
    facts = read(page, png_with(texts))["facts"]
    return facts.get("sampler"), facts.get("schedule")


def test_the_names_of_a1111s_samplers(tab: Page) -> None:
    names = {
        "DPM++ 2M Karras": ("dpmpp_2m", "karras"),
        "DPM++ 2M SDE Exponential": ("dpmpp_2m_sde", "exponential"),
        "DPM++ 2M SDE, Schedule type: SGM Uniform": ("dpmpp_2m_sde", "sgm_uniform"),
        "DPM++ 2M, Schedule type: Automatic": ("dpmpp_2m", None),
        "Euler a": ("euler_ancestral", None),
        "Euler": ("euler", None),
        "DDIM": ("ddim", None),
        "LCM": ("lcm", None),
        "Restart": (None, None),
        "constructor": (None, None),
        "Karras": (None, None),
    }
    assert {name: sampler_read(tab, name) for name in names} == names
    assert {name: sampler_read(tab, name) for name in SAMPLERS} == {name: (name, None) for name in SAMPLERS}


def test_a_text_that_is_no_parameters_gives_no_facts(tab: Page) -> None:
    texts = PngInfo()
    texts.add_text("parameters", "just: words, and: more")
    assert read(tab, png_with(texts)) == {"facts": None, "parameters": "just: words, and: more"}


@pytest.mark.parametrize("value", ["[1]", "null", "7", '"text"', "{", "NaN", "[" * 1_000_000])
def test_json_that_is_no_object_is_no_request(tab: Page, value: str) -> None:
    texts = PngInfo()
    texts.add_text("instep", value)
    assert read(tab, png_with(texts)) == {"facts": None, "parameters": None}


def test_a_seed_that_no_number_of_javascript_is_equal_to_is_left_out(tab: Page) -> None:
    found = read(tab, encode_image(PIXELS, "png", None, FACTS | {"seed": 2**53 + 1}))["facts"]
    assert found == {name: value for name, value in FACTS.items() if name != "seed"}


def test_a_broken_file_gives_nulls(tab: Page) -> None:
    nothing = {"facts": None, "parameters": None}
    whole = {format: encode_image(PIXELS, format, None, FACTS) for format in FORMATS}
    texts = PngInfo()
    texts.add_text("instep", json.dumps(FACTS), zip=True)
    squeezed = png_with(texts)
    place = squeezed.index(b"instep\0\0") + 20
    broken = [
        b"",
        b"\x89PNG\r\n\x1a\n",
        b"\x89PNG\r\n\x1a\n" + b"\xff" * 100,
        squeezed[:place] + b"\0\0\0\0" + squeezed[place + 4 :],
        b"\xff\xd8" + b"\xff\xe1\0\0" * 100_000,
        b"RIFF\xff\xff\xff\xffWEBPXMP \xff\xff\xff\xff<instep:Request>",
        b"<html>",
    ]
    for file in broken:
        assert read(tab, file, "readFacts") == read(tab, file) == nothing
    whole_ones = (None, FACTS, {name: FACTS[name] for name in FACTS if name != "model"})
    for format, file in whole.items():
        for end in range(0, len(file) - 40, 97):
            found = read(tab, file[:end], "readFacts")
            assert found["facts"] in whole_ones, (format, end)


def test_hostile_files_are_little_work(tab: Page) -> None:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + b"\0\0\0\0"

    bomb = zlib.compress(b'{"prompt": "' + b"a" * 400_000_000, 9)
    line = b"Steps: 1, " + b"a " * 2_000_000 + b'a:"\\",' * 500_000
    start = time.monotonic()
    for body in (
        chunk(b"zTXt", b"instep\0\0" + bomb),
        chunk(b"iTXt", b"instep\0\1\0\0\0" + bomb),
        chunk(b"tEXt", b"parameters\0a\n" + line),
        chunk(b"zTXt", b"instep\0\0junk") * 300_000,
        chunk(b"aaaa", b"") * 500_000,
    ):
        assert read(tab, b"\x89PNG\r\n\x1a\n" + body)["facts"] in (None, {"prompt": "a", "num_inference_steps": 1})
    assert time.monotonic() - start < 60
