"""Screenshots of every state of the page, for people to look at: `python -m tests.page.shots --out FOLDER`.

With the models that come with Instep, at 390 and 1280 pixels, light and dark. `--only drawing,done` takes some states,
`--look 1280-dark-open` one look.
"""

from __future__ import annotations

import argparse
import re
import tempfile
from collections.abc import Callable
from pathlib import Path

from playwright.sync_api import Browser, Page, expect

from app.settings import Settings
from app.worker.supervisor import WORKER
from tests.page.steps import arrive, button, draw, field, form, kept, paint, stage
from tests.parts.browser import Look, Visit, browsing
from tests.parts.servers import ALICE, ROOT, Server

LOOKS = [Look(width, dark) for width in (1280, 390) for dark in (False, True)]
PROMPTS = ("red apple", "a cat on a yellow background", "blue whale", "sunflower", "rocket", "slice of pizza")


def empty(page: Page) -> None:
    """As one finds it."""


def drawing(page: Page) -> None:
    draw(page, "red apple on a blue background", Steps=250, Images=4)
    stage(page).get_by_text(re.compile(r"step 1\d\d of 250")).first.wait_for()


def done(page: Page) -> None:
    for number, prompt in enumerate(PROMPTS, 1):
        draw(page, prompt, Steps=20)
        expect(kept(page)).to_have_count(number)


def opened(page: Page) -> None:
    kept(page).first.click()
    expect(page.get_by_role("dialog").get_by_role("img")).to_be_visible()


def edit(page: Page) -> None:
    button(page.get_by_role("dialog"), "Edit").click()
    paint(page)


def compare(page: Page) -> None:
    remove = button(page, "Remove the picture")
    if remove.count():
        remove.click()
    field(page, "Prompt").fill("a green frog")
    field(page, "Steps").fill("")
    form(page).get_by_label("Compare side by side").check()
    field(page, "What differs").select_option(label="Steps")
    field(page, "Values, with commas between them").fill("1, 2, 4, 8, 28, 250")
    form(page).get_by_role("button", name="side by side").click()
    stage(page).get_by_text(re.compile(r"step ([5-9]|1\d)\d of 250")).wait_for()


def compared(page: Page) -> None:
    expect(stage(page).get_by_role("progressbar")).to_have_count(0)
    expect(stage(page).get_by_text(re.compile(r"images in \d+ forwards"))).to_be_visible()


def more(page: Page) -> None:
    form(page).get_by_text("More fields").click()


def error(page: Page) -> None:
    form(page).get_by_label("Compare side by side").uncheck()
    draw(page, "a cat", Size="65x65")
    expect(stage(page).get_by_role("alert").first).to_be_visible()


STATES: tuple[Callable[[Page], None], ...] = (empty, drawing, done, opened, edit, compare, compared, more, error)
"""In this order: each begins where the last one ended."""


def shoot(browser: Browser, url: str, look: Look, out: Path, only: set[str]) -> None:
    visit = arrive(Visit(browser, url, look))
    last = max(number for number, state in enumerate(STATES) if not only or state.__name__ in only)
    for state in STATES[: last + 1]:
        state(visit.page)
        if not only or state.__name__ in only:
            save(visit, state.__name__, out)
        if state is drawing:
            button(stage(visit.page), "Cancel").click()
            field(visit.page, "Images").fill("")
            button(stage(visit.page), "Take off the page").click()
    for line in visit.surprises():
        print(f"{look}: {line}")
    visit.close()


def asked(browser: Browser, url: str, look: Look, out: Path) -> None:
    """The page that asks for a key."""
    visit = Visit(browser, url, look)
    expect(visit.open().get_by_label("API key")).to_be_visible()
    save(visit, "key", out)
    visit.close()


def save(visit: Visit, state: str, out: Path) -> None:
    dialog = visit.page.get_by_role("dialog").count() > 0
    if not dialog:
        visit.page.evaluate("scrollTo(0, 0)")  # what stays in sight while one scrolls would be in the middle
    file = out / f"{state}-{str(visit.look).rpartition('-')[0]}.png"
    visit.page.screenshot(path=file, full_page=not dialog)
    print(file)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--only", default="", help=", ".join(["key", *(state.__name__ for state in STATES)]))
    parser.add_argument("--look", default="", help=", ".join(map(str, LOOKS)))
    words = parser.parse_args()
    words.out.mkdir(parents=True, exist_ok=True)
    only = {name for name in words.only.split(",") if name}
    looks = [look for look in LOOKS if words.look in ("", str(look))]
    with tempfile.TemporaryDirectory() as cache, browsing() as browser:
        facts = Settings(models=ROOT / "models", cache=Path(cache), devices="cpu", dtype="float32", port=0, drain=5)
        if not only or "key" in only:
            with Server(facts.model_copy(update={"api_keys": f"alice={ALICE}"})) as server:
                for look in looks:
                    asked(browser, server.ready().url, look, words.out)
        if only != {"key"}:
            preload = facts.model_copy(update={"preload": "emoji-mmdit"})
            with Server(preload, WORKER) as server:
                for look in looks:
                    shoot(browser, server.ready().url, look, words.out, only - {"key"})


if __name__ == "__main__":
    main()
