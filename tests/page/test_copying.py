"""What the page copies as curl and as Python is run as it is, and draws the same picture."""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from playwright.sync_api import Page, expect

from tests.page.conftest import Visits
from tests.page.steps import arrive, button, choose_model, draw, drop, field, kept, paint, stage
from tests.parts.browser import Look, Visit
from tests.parts.edits import as_field, picture
from tests.parts.servers import ALICE, Server

pytestmark = pytest.mark.slow


def copied(page: Page, name: str) -> str:
    button(stage(page), f"Copy as {name}").click()
    expect(button(stage(page), "Copied")).to_be_visible()
    return str(page.evaluate("navigator.clipboard.readText()"))


def downloaded(page: Page, folder: Path) -> np.ndarray:
    with page.expect_download() as waited:
        button(stage(page), "Download").click()
    waited.value.save_as(folder / "page.png")
    return np.asarray(Image.open(folder / "page.png"))


def executed(words: str, language: str, folder: Path) -> np.ndarray:
    """The picture that it leaves in the folder, which it is run in."""
    before = {*folder.iterdir()}
    command = ["bash", "-euc", words] if language == "curl" else [sys.executable, "-c", words]
    environment = {**os.environ, "INSTEP_KEY": ALICE}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, f"{words}\n{done.stderr}"
    (made,) = (file for file in folder.iterdir() if file not in before)
    return np.asarray(Image.open(made))


@pytest.fixture(params=["curl", "Python"])
def language(request: pytest.FixtureRequest) -> str:
    if request.param == "curl" and not shutil.which("curl"):
        (pytest.fail if os.environ.get("CI") else pytest.skip)("the copied curl is not tested: there is no curl")
    return str(request.param)


def test_it_draws_the_same_picture(visits: Visits, studio: Server, language: str, tmp_path: Path) -> None:
    """With the real worker: equal pixels, for a prompt with quotes and other letters."""
    page = arrive(visits(Look(1280), studio.url)).page
    field(page, "Sampler").select_option("flow_heun")
    draw(page, 'it\'s a "red" apple, $HOME `x` \\ 猫\n!', Steps=6, Guidance=3.5, **{"Negative prompt": "it's blue"})
    expect(kept(page)).to_have_count(1)
    words = copied(page, language)
    theirs, ours = executed(words, language, tmp_path), downloaded(page, tmp_path)
    assert theirs.shape == (64, 64, 3) and np.abs(theirs.astype(int) - ours).max() <= 2
    assert theirs.std() > 20


def test_it_works_with_a_key_which_is_not_in_it(visits: Visits, look: Look, language: str, tmp_path: Path) -> None:
    """The key comes from the environment; what is copied can be shown to anybody."""
    visit: Visit = arrive(visits(look))
    choose_model(visit.page, "tiny-dit")
    field(visit.page, "Class").fill("red")
    button(visit.page, "Draw").click()
    expect(kept(visit.page)).to_have_count(1)
    words = copied(visit.page, language)
    assert ALICE not in words and ("INSTEP_KEY" in words) == look.closed
    assert (executed(words, language, tmp_path) == downloaded(visit.page, tmp_path)).all()


def test_an_edit_behind_a_mask_is_copied_with_its_files(visits: Visits, language: str, tmp_path: Path) -> None:
    """The source and the mask are downloaded beside what is run."""
    page = arrive(visits(Look(1280))).page
    drop(page, "cat.png", "image/png", base64.b64decode(as_field(picture(32, 32))))
    button(page.get_by_role("dialog"), "Draw from this picture").click()
    paint(page)
    fields = {"Prompt": "a dog", "Strength": "0.4", "Mask blur": "0", "Seed": "5"}
    for label, value in fields.items():
        field(page, label).fill(value)
    page.get_by_label("ink", exact=True).check()
    button(page, "Draw from the picture").click()
    expect(kept(page)).to_have_count(1)
    for name in ("source", "mask"):
        with page.expect_download() as waited:
            button(stage(page), f"Download the {name}").click()
        waited.value.save_as(tmp_path / waited.value.suggested_filename)
    words = copied(page, language)
    assert (executed(words, language, tmp_path) == downloaded(page, tmp_path)).all()
