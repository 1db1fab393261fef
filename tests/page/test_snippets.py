"""The curl and the Python of app/page/snippets.js, run as a person runs them against a server."""

from __future__ import annotations

import ast
import json
import os
import re
import shlex
import subprocess
import sys
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page

from tests.page.modules import run
from tests.parts.edits import as_field, half_mask, picture
from tests.parts.servers import ALICE, Server, bearer

pytestmark = pytest.mark.slow

DRAW, EDIT = "v1/images/generations", "v1/images/edits"
FUNCTIONS = ["curl", "python"]
NASTY = [
    "a red fox",
    "it's \"quoted\" 'twice' and \\back\\ \\' \\\\\" \\u0041 \\n",
    "two\nlines\n\nand\ta tab ",
    "$HOME ${HOME} $(touch pwned) `touch pwned` !! !fox ; touch pwned & | > pwned < in * ? ~ #no %s {a,b} [1]",
    "ünïcode 漢字 🦊 \u2028 \ufeff e\u0301",
    "@source.png",
    "<source.png",
    'a;type=image/png,b"; filename=c',
    "-o pwned --form x=y",
    "'''\"\"\"{prompt}%(prompt)s\\",
    "\u202eright to left <b>bold</b> & &amp; </script>",
]
CONTROLS = "rings\x07 and ends a paste\x1b[201~\ntouch pwned\n\x7f\x9b201~"


def snippet(page: Page, function: str, **arguments: object) -> str:
    return run(page, "snippets", f"return m.{function}(given)", arguments)


def executed(text: str, function: str, folder: Path) -> Image.Image:
    """The picture that a snippet writes into this folder, where it writes nothing else."""
    words = ["bash", "--norc", "-c", text] if function == "curl" else [sys.executable, "-c", text]
    before = {*os.listdir(folder)}
    done = subprocess.run(words, cwd=folder, env=os.environ | {"INSTEP_KEY": ALICE}, capture_output=True, timeout=60)
    assert done.returncode == 0, (text, done.stderr)
    assert {*os.listdir(folder)} - before == {"picture.png"}
    return opened((folder / "picture.png").read_bytes())


def opened(file: bytes) -> Image.Image:
    assert file.startswith(b"\x89PNG"), file[:500]
    return Image.open(BytesIO(file))


def drawn(site: Server, body: dict[str, Any], path: str = DRAW) -> Image.Image:
    """What the server draws for this body."""
    headers = {"Accept": "image/png"} | bearer(ALICE)
    return opened(httpx.post(f"{site.url}/{path}", json=body, headers=headers, timeout=60).content)


def facts_of(image: Image.Image) -> dict[str, Any]:
    return json.loads(image.text["instep"])


def same(one: Image.Image, other: Image.Image) -> bool:
    return facts_of(one) == facts_of(other) and np.array_equal(np.asarray(one), np.asarray(other))


@pytest.mark.parametrize("prompt", [*NASTY, CONTROLS], ids=range(len(NASTY) + 1))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_it_draws_the_same_picture(
    tab: Page, sites: dict[bool, Server], tmp_path: Path, function: str, prompt: str
) -> None:
    body = {"model": "tiny-sd3", "prompt": prompt, "negative_prompt": f"no {prompt}", "seed": 7, "guidance_scale": 4.5}
    wanted = drawn(sites[False], body)
    facts = facts_of(wanted)
    assert facts["prompt"] == prompt
    text = snippet(tab, function, origin=sites[False].url, path=DRAW, facts=facts, closed=False)
    assert "INSTEP_KEY" not in text
    assert same(executed(text, function, tmp_path), wanted)


@pytest.mark.parametrize("prompt", NASTY, ids=range(len(NASTY)))
@pytest.mark.parametrize("function", FUNCTIONS)
def test_it_edits_the_same_picture_with_a_key(
    tab: Page, sites: dict[bool, Server], tmp_path: Path, function: str, prompt: str
) -> None:
    for name, pixels in {"source.png": picture(64, 64), "mask.png": half_mask(64, 64)}.items():
        Image.fromarray(pixels).save(tmp_path / name)
    files = {"image": as_field(picture(64, 64)), "mask_image": as_field(half_mask(64, 64))}
    own = {"strength": 0.7, "mask_blur": 0, "loras": [{"name": "ink", "weight": 0.5}, {"name": "wash", "weight": -1}]}
    body = {"model": "tiny-sd3", "prompt": prompt, "negative_prompt": f"no {prompt}", "seed": 7, **own}
    wanted = drawn(sites[True], body | files, EDIT)
    facts = facts_of(wanted)
    assert own.items() <= facts.items()
    told = {"origin": sites[True].url, "path": EDIT, "facts": facts, "closed": True, "masked": True}
    text = snippet(tab, function, **told)
    assert "INSTEP_KEY" in text and ALICE not in text
    found = executed(text, function, tmp_path)
    assert same(found, wanted)


@pytest.mark.parametrize("function", FUNCTIONS)
def test_what_could_end_a_paste_is_not_in_the_text(tab: Page, function: str) -> None:
    for path in (DRAW, EDIT):
        told = {
            "origin": "http://a",
            "path": path,
            "facts": {"prompt": CONTROLS, CONTROLS: [CONTROLS]},
            "closed": False,
        }
        text = snippet(tab, function, **told)
        assert not re.search(r"[\0-\x08\x0b-\x1f\x7f-\x9f]", text)


@pytest.mark.parametrize("function", FUNCTIONS)
@pytest.mark.parametrize("path", [DRAW, EDIT])
def test_a_picture_of_a_class_and_a_list(
    tab: Page, sites: dict[bool, Server], tmp_path: Path, function: str, path: str
) -> None:
    Image.fromarray(picture(32, 32)).save(tmp_path / "source.png")
    files = {"image": as_field(picture(32, 32))} if path == EDIT else {}
    for body in (
        {"model": "tiny-dit", "class_label": 2, "seed": 7},
        {"model": "tiny-dit", "class_label": [2, 1], "grid": {"columns": 2}, "seed": 7},
        {"model": "tiny-sd3", "prompt": ["one", "@two"], "grid": {"columns": 1}, "seed": 0},
    ):
        wanted = drawn(sites[False], body | files, path)
        facts = facts_of(wanted)
        text = snippet(tab, function, origin=sites[False].url, path=path, facts=facts, closed=False)
        assert same(executed(text, function, tmp_path), wanted)
        (tmp_path / "picture.png").unlink()


def test_fields_of_how_it_is_sent_are_left_out(tab: Page) -> None:
    facts = {
        "prompt": "a",
        "stream": True,
        "progress": True,
        "partial_images": 2,
        "output_format": "jpeg",
        "size": None,
    }
    told = {"origin": "https://host/some path/it's", "path": DRAW, "facts": facts, "closed": False}
    assert snippet(tab, "curl", **told) == (
        "curl 'https://host/some path/it'\\''s/v1/images/generations' -H 'Accept: image/png'"
        " -H 'Content-Type: application/json' -d '{\"prompt\":\"a\"}' -o picture.png"
    )
    python = snippet(tab, "python", **told)
    assert 'base_url="https://host/some path/it\'s/v1"' in python
    assert '    prompt="a",\n)' in python


@pytest.mark.parametrize("function", FUNCTIONS)
def test_values_of_every_type_of_json(tab: Page, function: str) -> None:
    facts = {"prompt": "a", "x); import os; (": {"deep": [None, True, False, 1.5, -2, 1e300, {"'": '"'}, []], "e": {}}}
    text = snippet(tab, function, origin="http://a", path=DRAW, facts=facts, closed=False)
    if function == "curl":
        words = shlex.split(text)
        assert json.loads(words[words.index("-d") + 1]) == facts
    else:
        keywords = [one for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call) for one in node.keywords]
        (extra,) = (one.value for one in keywords if one.arg == "extra_body")
        assert ast.literal_eval(extra) == {name: facts[name] for name in facts if name != "prompt"}
