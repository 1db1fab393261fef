"""What holds for the whole page: accessible, light, fast, of this server alone, by keyboard and on a phone."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import httpx
import pytest
from playwright.sync_api import Page, expect

from tests.page.conftest import Visits
from tests.page.steps import arrive, button, draw, enter_key, expect_no_window, field, form, gallery, kept, stage
from tests.parts.browser import Look, Visit
from tests.parts.npm import installed
from tests.parts.servers import ROOT

pytestmark = pytest.mark.slow

FILES = ROOT / "app" / "page"
WIDTHS = [Look(390, dark=True), Look(1280)]
FOUR = [Look(width, dark) for width in (390, 1280) for dark in (False, True)]
Check = Callable[[Page], list[str]]


@pytest.fixture(scope="package")
def axe(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """What axe-core finds wrong with a page, by its rules for WCAG 2.2 and its best practices."""
    folder = installed(
        Path(__file__).with_name("npm"), tmp_path_factory.mktemp("axe") / "npm", "the accessibility of the page is"
    )
    script = (folder / "node_modules" / "axe-core" / "axe.min.js").read_text(encoding="utf-8")

    def check(page: Page) -> list[str]:
        page.evaluate(script)
        found: dict[str, Any] = page.evaluate("axe.run({ resultTypes: ['violations'] })")
        return [
            f"{one['impact']} {one['id']}: {one['help']}: {[node['html'][:200] for node in one['nodes']]}"
            for one in found["violations"]
        ]

    return check


@pytest.mark.parametrize("look", FOUR, ids=str)
def test_axe_finds_nothing_in_any_state(visits: Visits, axe: Check, look: Look) -> None:
    visit = arrive(visits(look))
    page = visit.page
    form(page).get_by_text("More fields").click()
    states = {"empty": axe(page)}
    draw(page, "!slow 600")
    expect(stage(page).get_by_role("progressbar")).to_be_visible()
    states["drawing"] = axe(page)
    button(stage(page), "Cancel").click()
    draw(page, "!nan")
    expect(stage(page).get_by_role("alert")).to_be_visible()
    draw(page, "a cat", Images=2)
    expect(kept(page)).to_have_count(2)
    form(page).get_by_label("Compare side by side").check()
    states["done"] = axe(page)
    kept(page).first.click()
    expect(page.get_by_role("dialog")).to_be_visible()
    states["opened"] = axe(page)
    button(page.get_by_role("dialog"), "Edit").click()
    expect(page.get_by_role("region", name="Picture to start from")).to_be_visible()
    states["edit"] = axe(page)
    assert {state: found for state, found in states.items() if found} == {}


@pytest.mark.parametrize("look", [Look(390, dark=True, closed=True), Look(1280, closed=True)], ids=str)
def test_axe_finds_nothing_where_the_key_is_asked_for(visits: Visits, axe: Check, look: Look) -> None:
    visit = visits(look)
    visit.expect("status of 401 .*/v1/models$")
    enter_key(visit.open(), "sk-wrong-0123456789")
    expect(visit.page.get_by_role("alert")).to_be_visible()
    assert axe(visit.page) == []


def test_axe_sees_a_fault(visits: Visits, axe: Check) -> None:
    """The control: a button without a name, and words that are too pale."""
    visit = arrive(visits(Look(1280)))
    visit.page.evaluate("""() => {
      const pale = Object.assign(document.createElement("p"), { textContent: "pale" });
      pale.style.color = "#eee";
      document.querySelector("main").append(document.createElement("button"), pale);
    }""")
    found = " ".join(axe(visit.page))
    assert "button-name" in found and "color-contrast" in found


def test_all_files_together_are_small(http: httpx.Client) -> None:
    sizes = {file.name: file.stat().st_size for file in FILES.rglob("*") if file.is_file()}
    assert len(sizes) > 10 and sum(sizes.values()) <= 200_000, sizes


@pytest.mark.parametrize("look", WIDTHS, ids=str)
def test_the_first_paint_is_quick(visits: Visits, look: Look) -> None:
    """First contentful paint on loopback; what is measured is about a tenth of this bound."""
    page = arrive(visits(look)).page
    (paint,) = page.evaluate("performance.getEntriesByName('first-contentful-paint').map((one) => one.startTime)")
    loaded = page.evaluate("performance.getEntriesByType('resource').reduce((sum, one) => sum + one.transferSize, 0)")
    print(f"first contentful paint {look}: {paint:.0f} ms, {loaded} bytes")
    assert paint < 1000 and loaded < 250_000


def test_its_policy_lets_nothing_inline_run(visits: Visits) -> None:
    """The header is strict, and the browser obeys it: a planted script, style and handler do nothing."""
    visit = visits(Look(1280))
    planted = (
        '<script>document.title = "ran"</script><img src="x" onerror="document.title = \'ran\'">'
        '<p id="planted" style="position: fixed">planted</p><script src="http://127.0.0.1:9/a.js"></script>'
    )

    def plant(route: Any) -> None:
        reply = route.fetch()
        route.fulfill(response=reply, body=reply.text().replace("</body>", f"{planted}</body>"))

    visit.page.route(lambda address: address == f"{visit.url}/", plant)
    visit.expect("Content Security Policy", "another host: http://127.0.0.1:9/", "csp", "status of 404 .*/x$")
    arrive(visit)
    expect(visit.page.get_by_text("planted")).to_be_visible()
    assert visit.page.title() == "Instep"
    assert visit.page.evaluate("getComputedStyle(document.getElementById('planted')).position") == "static"
    assert sum("Content Security Policy" in line for line in visit.faults) >= 4, visit.faults


def test_the_pages_headers(sites: dict[bool, Any]) -> None:
    for site in sites.values():
        for path in ("/", "/page/start.js", "/page/page.css"):
            reply = httpx.get(site.url + path)
            policy = reply.headers["content-security-policy"]
            assert reply.status_code == 200 and "default-src 'none'" in policy and "script-src 'self'" in policy
            assert "unsafe" not in policy and "http" not in policy and "*" not in policy
            assert reply.headers["x-content-type-options"] == "nosniff"


def test_the_docs_are_one_link_away(visits: Visits) -> None:
    visit = arrive(visits(Look(1280)))
    visit.page.get_by_role("link", name="API").click()
    expect(visit.page.get_by_text("/v1/images/generations", exact=True)).to_be_visible()
    assert visit.page.url == f"{visit.url}/docs"


@pytest.mark.parametrize("look", [Look(390, closed=True), Look(390, dark=True)], ids=str)
def test_nothing_is_wider_than_a_phone(visits: Visits, look: Look) -> None:
    page = arrive(visits(look)).page
    wide = "document.documentElement.scrollWidth - document.documentElement.clientWidth"
    form(page).get_by_text("More fields").click()
    assert page.evaluate(wide) == 0
    draw(page, "pneumonoultramicroscopicsilicovolcanoconiosis" * 3, Images=2)
    expect(kept(page)).to_have_count(2)
    form(page).get_by_label("Compare side by side").check()
    assert page.evaluate(wide) == 0
    kept(page).first.click()
    assert page.evaluate(wide) == 0
    button(page.get_by_role("dialog"), "Edit").click()
    assert page.evaluate(wide) == 0


def focused(page: Page) -> str:
    """The name of what has the focus, as a screen reader says it."""
    return str(
        page.evaluate("""() => {
          const one = document.activeElement;
          const label = one.getAttribute("aria-label")?.replaceAll("\\n", " ");
          return label ?? (one.labels?.[0] ?? one).innerText.trim().split("\\n")[0];
        }""")
    )


def tab_to(page: Page, name: str) -> None:
    """Press Tab until this has the focus, at most 80 times."""
    for _ in range(80):
        page.keyboard.press("Tab")
        if focused(page) == name:
            return
    raise AssertionError(f"Tab never comes to {name}")


def test_a_picture_is_drawn_opened_and_deleted_by_keyboard_alone(visit: Visit) -> None:
    page = visit.page
    page.evaluate("document.activeElement.blur()")
    tab_to(page, "Prompt")
    page.keyboard.type("a cat")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("with a hat")
    expect(field(page, "Prompt")).to_have_value("a cat\nwith a hat")
    page.keyboard.press("Enter")
    expect(kept(page)).to_have_count(1)
    tab_to(page, "Open a cat with a hat")
    page.keyboard.press("Enter")
    dialog = page.get_by_role("dialog")
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    expect_no_window(page)
    page.keyboard.press("Enter")
    expect(dialog).to_be_visible()
    tab_to(page, "Delete")
    page.keyboard.press("Space")
    expect(kept(page)).to_have_count(0)
    expect_no_window(page)


def test_escape_cancels_what_is_being_drawn(visit: Visit) -> None:
    draw(visit.page, "!slow 600")
    expect(stage(visit.page).get_by_text("step 1 of 8")).to_be_visible()
    visit.page.keyboard.press("Escape")
    expect(stage(visit.page).get_by_text("cancelled", exact=True)).to_be_visible()


def test_escape_in_a_list_of_choices_cancels_nothing(visit: Visit) -> None:
    page = visit.page
    draw(page, "!slow 60", Steps=20)
    expect(button(stage(page), "Cancel")).to_be_visible()
    for label in ("Size", "Model"):
        field(page, label).press("Escape")
    expect(button(stage(page), "Cancel")).to_be_visible()
    field(page, "Prompt").press("Escape")
    expect(stage(page).get_by_text("cancelled")).to_be_visible()


def test_words_of_any_length_and_direction_have_their_place(visit: Visit) -> None:
    page = visit.page
    for words, direction in (("x " * 4000, "ltr"), ("\u05ea\u05e4\u05d5\u05d7", "rtl")):
        draw(page, words)
        heading = stage(page).get_by_role("heading").first
        expect(heading).to_have_text(words.strip())
        assert heading.evaluate("(one) => getComputedStyle(one).direction") == direction
        assert heading.evaluate("(one) => one.offsetHeight") < 100
        assert field(page, "Prompt").evaluate("(one) => getComputedStyle(one).direction") == direction
    expect(kept(page)).to_have_count(2)


def test_text_grows_with_the_browsers_own_size(visit: Visit) -> None:
    page = visit.page
    small = page.evaluate("getComputedStyle(document.body).fontSize")
    page.evaluate("document.documentElement.style.fontSize = '200%'")
    assert page.evaluate("getComputedStyle(document.body).fontSize") == f"{2 * float(small.removesuffix('px')):g}px"
    assert page.evaluate("document.documentElement.scrollWidth - document.documentElement.clientWidth") == 0


def test_the_order_of_tab_is_that_of_reading(visits: Visits) -> None:
    """The way down the page: each next stop is lower, or to the right, within the form."""
    page = arrive(visits(Look(1280))).page
    page.evaluate("document.activeElement.blur()")
    names = []
    for _ in range(14):
        page.keyboard.press("Tab")
        names.append(focused(page))
    order = [names.index(name) for name in ("Prompt", "Draw", "Model", "Steps", "Guidance", "Sampler", "Size", "Seed")]
    assert order == sorted(order), names


@pytest.mark.parametrize("look", WIDTHS, ids=str)
def test_nothing_moves_for_those_who_asked_for_it(visits: Visits, look: Look) -> None:
    """With `prefers-reduced-motion`, no animation runs while a picture is drawn; without it some may."""
    visit = visits(look, reduced_motion="reduce")
    arrive(visit)
    draw(visit.page, "!slow 600")
    expect(stage(visit.page).get_by_role("progressbar")).to_be_visible()
    moving = "document.getAnimations().filter((one) => one.effect.getComputedTiming().duration > 10).length"
    assert visit.page.evaluate(moving) == 0
    button(stage(visit.page), "Cancel").click()
    expect(gallery(visit.page)).to_be_visible()
