"""The picture at the top of the README, drawn anew: `python -m tests.page.picture --out docs/page/drawing.webp`.

Twelve requests of 1 to 50 steps were started at once; some are done, the others are shown while they are drawn.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from io import BytesIO
from pathlib import Path

from PIL import Image
from playwright.sync_api import Page, expect

from app.settings import Settings
from app.worker.supervisor import WORKER
from tests.page.steps import arrive, button, draw, field, form, kept, stage
from tests.parts.browser import Look, Visit, browsing
from tests.parts.servers import ROOT, Server

BEFORE = ("red heart on a yellow background", "sunflower on a blue background", "frog on a pink background")
PROMPT = "snowman on a blue background"
STEPS = (1, 2, 3, 4, 6, 8, 12, 16, 20, 28, 40, 50)
DONE = 3
"""Steps of the picture whose end the screenshot waits for."""

SIZE = (1280, 1010)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    out = parser.parse_args().out
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as cache, browsing() as browser:
        facts = Settings(models=ROOT / "models", cache=Path(cache), devices="cpu", port=0, drain=5)
        with Server(facts.model_copy(update={"preload": "emoji-mmdit"}), WORKER) as server:
            visit = arrive(Visit(browser, server.ready().url, Look(1280)))
            visit.page.set_viewport_size({"width": SIZE[0], "height": SIZE[1]})
            take(visit, out)
            visit.close()
    print(f"{out}: {out.stat().st_size / 1e3:.0f} kB")


def take(visit: Visit, out: Path) -> None:
    """Draw twelve at once until the widths are measured, then the gallery's pictures; save how twelve are drawn."""
    page = visit.page
    crowd(page)
    expect(kept(page)).to_have_count(len(STEPS))
    page.on("dialog", lambda dialog: dialog.accept())
    button(page, "Delete all").click()
    button(stage(page), "Take off the page").click()
    form(page).get_by_label("Compare side by side").uncheck()
    for number, prompt in enumerate(BEFORE, 1):
        draw(page, prompt, Seed=200)
        expect(kept(page)).to_have_count(number)
        button(stage(page), "Take off the page").click()
    crowd(page)
    expect(stage(page).get_by_text(re.compile(f"^{DONE} steps in "))).to_be_visible()
    page.mouse.move(0, 0)
    Image.open(BytesIO(page.screenshot())).convert("RGB").save(out, quality=90, method=6)


def crowd(page: Page) -> None:
    """Start twelve requests at once."""
    field(page, "Prompt").fill(PROMPT)
    form(page).get_by_label("Compare side by side").check()
    field(page, "Values, with commas between them").fill(", ".join(map(str, STEPS)))
    form(page).get_by_role("button", name="side by side").click()


if __name__ == "__main__":
    main()
