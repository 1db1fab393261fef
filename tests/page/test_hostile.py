"""What goes wrong around the page: strange files, servers that break off, storage that is refused, quick hands."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from playwright.sync_api import Page, Route, expect

from app.imaging import encode_image
from app.settings import Settings
from tests.page.steps import arrive, button, choose_model, draw, drop, field, kept, sent, stage
from tests.parts.browser import Look, Visit
from tests.parts.servers import ALICE, Served, free_port

pytestmark = pytest.mark.slow

DESK = Look(1280)
CLOSED = Look(1280, closed=True)
Visits = Callable[..., Visit]


@pytest.fixture
def visit(visits: Visits) -> Visit:
    return arrive(visits(DESK))


@pytest.fixture
def page(visit: Visit) -> Page:
    return visit.page


def drop_facts(page: Page, facts: dict[str, Any]) -> None:
    """Drop a picture that has these facts, and use them."""
    file = encode_image(np.zeros((16, 16, 3), np.uint8), "png", None, {"prompt": "x"})
    before, after = b'{"prompt": "x"}', json.dumps(facts).encode()
    start = file.index(b"tEXtinstep\0") - 4
    body = b"tEXtinstep\0" + after
    file = file[:start] + (len(body) - 4).to_bytes(4, "big") + body + file[start + 4 + 11 + len(before) :]
    drop(page, "strange.png", "image/png", file)
    button(page, "Use its settings").click()


STRANGE: list[dict[str, Any]] = [
    {"prompt": {"a": 1}, "loras": 5, "refiner": "x", "n": "2", "seed": {}, "size": ["a"], "crop": 1},
    {"prompt": 5, "loras": [{"name": 1}], "refiner": {"model": 5}, "sampler": "constructor", "schedule": {}},
    {"prompt": None, "loras": [None], "refiner": {}, "n": -5, "seed": 1e300, "num_inference_steps": 1e9},
    {"model": {"toString": 5}, "prompt": ["a", "b"], "grid": {"columns": 2}, "stream": False, "n": 1.5},
    {"model": "<img src=x onerror=alert(1)>", "prompt": "<script>alert(1)</script>", "__proto__": {"prompt": "y"}},
    {"constructor": 1, "toString": 2, "hasOwnProperty": 3, "negative_prompt": [], "response_format": "url"},
]


@pytest.mark.parametrize("facts", STRANGE, ids=range(len(STRANGE)))
def test_the_settings_of_a_strange_file_leave_the_page_alive(page: Page, facts: dict[str, Any]) -> None:
    drop_facts(page, facts)
    expect(page.get_by_role("dialog")).to_have_count(0)
    page.reload()
    draw(page, "a red fox")
    expect(kept(page, "a red fox")).to_have_count(1)


def test_what_the_model_does_not_take_is_named(page: Page) -> None:
    drop_facts(page, {"prompt": "a fox", "sampler": "euler_ancestral", "num_inference_steps": 5, "seed": 7})
    expect(page.get_by_role("alert")).to_contain_text("tiny-sd3 does not take its sampler")
    expect(field(page, "Prompt")).to_have_value("a fox")
    assert {"seed": 7, "num_inference_steps": 5}.items() <= sent(page).items()


def test_of_a_sheet_the_first_prompt_is_drawn_alone(page: Page) -> None:
    drop_facts(page, {"prompt": ["one", "two"], "grid": {"columns": 2}, "seed": 7})
    body = sent(page)
    assert body["prompt"] == "one" and "grid" not in body
    expect(stage(page).get_by_role("img", name="one", exact=True)).to_have_count(1)


def test_a_form_that_was_kept_by_another_version_is_no_trap(visits: Visits) -> None:
    visit = visits(DESK)
    visit.open()
    visit.page.wait_for_load_state("networkidle")
    for text in ("5", "{", '{"id": "tiny-sd3"}', '{"id": "tiny-sd3", "values": {"loras": 5, "prompt": []}}', "null"):
        visit.page.evaluate("(text) => localStorage.setItem('instep-form', text)", text)
        visit.page.reload()
        expect(button(visit.page, "Draw")).to_be_visible()
        visit.page.wait_for_load_state("networkidle")


def test_nothing_to_compare_is_said(page: Page) -> None:
    field(page, "Prompt").fill("a fox")
    page.get_by_label("Compare side by side").check()
    page.get_by_label("Values, with commas between them").fill("none")
    button(page, "Draw 0 side by side").click()
    expect(page.get_by_role("alert")).to_contain_text("nothing to compare")
    page.get_by_label("Values, with commas between them").fill("1, 2")
    button(page, "Draw 2 side by side").click()
    expect(kept(page)).to_have_count(2)


def test_a_schedule_that_the_sampler_does_not_walk_is_not_sent(page: Page) -> None:
    field(page, "Schedule").select_option("karras")
    field(page, "Prompt").fill("a fox")
    assert sent(page)["schedule"] == "karras"
    field(page, "Sampler").select_option("flow_dpmpp_2m")
    expect(field(page, "Schedule").locator("option:checked")).to_have_text("default")
    assert "schedule" not in sent(page)
    expect(kept(page)).to_have_count(2)


def test_enter_draws_only_what_the_form_allows(page: Page) -> None:
    field(page, "Prompt").press("Enter")
    field(page, "Steps").fill("101")
    field(page, "Prompt").fill("a fox")
    field(page, "Prompt").press("Enter")
    expect(field(page, "Steps")).to_be_focused()
    field(page, "Steps").fill("2")
    field(page, "Prompt").press("Enter")
    expect(kept(page)).to_have_count(1)


def test_a_fault_in_a_closed_part_of_the_form_is_shown(page: Page) -> None:
    page.get_by_text("More fields").click()
    field(page, "Priority").fill("99")
    page.get_by_text("More fields").click()
    draw(page, "a fox")
    expect(field(page, "Priority")).to_be_focused()


def test_of_two_models_that_were_chosen_quickly_the_second_stays(page: Page) -> None:
    held: list[Route] = []
    page.route("**/v1/models/tiny-sd3-turbo", lambda route: held.append(route))
    field(page, "Model").select_option("tiny-sd3-turbo")
    choose_model(page, "tiny-dit")
    expect(field(page, "Class")).to_be_visible()
    held[0].continue_()
    page.wait_for_load_state("networkidle")
    expect(field(page, "Model")).to_have_value("tiny-dit")


def test_a_model_that_is_removed_meanwhile(visit: Visit) -> None:
    page = visit.page
    visit.expect("status of 404")
    gone = {"status": 404, "json": {"error": {"message": "There is no model tiny-dit.", "code": "model_not_found"}}}
    page.route("**/v1/models/tiny-dit", lambda route: route.fulfill(**gone))
    field(page, "Model").select_option("tiny-dit")
    expect(page.get_by_role("alert")).to_contain_text("There is no model tiny-dit.")
    expect(field(page, "Model")).to_have_value("tiny-sd3")
    drop_facts(page, {"model": "tiny-dit", "class_label": 1, "seed": 7})
    expect(page.get_by_role("alert")).to_contain_text("There is no model tiny-dit.")
    page.get_by_role("button", name="Dismiss").click()
    draw(page, "a fox")
    expect(kept(page)).to_have_count(1)


def test_a_thousand_classes_with_names_of_markup(page: Page) -> None:
    choose_model(page, "tiny-dit")
    data = [{"id": one, "name": f"<img src=x onerror='alert({one // 2})'>\"&amp;"} for one in range(1000)]
    page.route("**/classes?q=many", lambda route: route.fulfill(json={"data": data}))
    field(page, "Class").fill("many")
    options = page.locator("#classes option")
    expect(options).to_have_count(50)
    values = [options.nth(one).get_attribute("value") for one in (0, 1, 49)]
    assert values == ["0", "1", "49"]
    assert page.locator("img[src=x]").count() == 0


def test_classes_of_an_older_search_do_not_come_back(page: Page) -> None:
    choose_model(page, "tiny-dit")
    held: list[Route] = []
    page.route("**/classes?q=slow", lambda route: held.append(route))
    with page.expect_request("**/classes?q=slow"):
        field(page, "Class").fill("slow")
    with page.expect_response("**/classes?q=1"):
        field(page, "Class").fill("1")
    expect(page.locator("#classes option")).to_have_count(1)
    held[0].fulfill(json={"data": [{"id": one, "name": f"old {one}"} for one in range(9)]})
    page.wait_for_load_state("networkidle")
    expect(page.locator("#classes option")).to_have_count(1)


def event(kind: str, **facts: object) -> str:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **facts})}\n\n"


ACCEPTED = event("image_generation.accepted", queue_position=0, estimated_wait=0.1, cost=0.1)
STREAMS = {
    "it ends early": ACCEPTED + event("image_generation.progress", step=1, steps=8),
    "it ends at once": "",
    "it is no stream": "<html>502</html>",
    "its JSON is cut": ACCEPTED + "data: {\n\n",
    "an image that nobody asked for": ACCEPTED + event("image_generation.progress", image_index=7, step=1, steps=8),
}


@pytest.mark.parametrize("name", STREAMS)
def test_a_stream_that_breaks_off_fails_the_picture_and_can_be_tried_again(visit: Visit, name: str) -> None:
    page = visit.page
    visit.expect("failed: .*/generations net::ERR_ABORTED")  # what is no stream is not read to its end
    headers = {"Content-Type": "text/event-stream"}
    page.route("**/v1/images/generations", lambda route: route.fulfill(body=STREAMS[name], headers=headers), times=1)
    draw(page, "a fox")
    expect(stage(page).get_by_role("alert")).to_be_visible()
    button(page, "Try again").click()
    expect(kept(page)).to_have_count(1)
    expect(stage(page).get_by_role("alert")).to_have_count(0)


def test_an_error_of_the_whole_stream_fails_all_that_are_open(page: Page) -> None:
    error = f"event: error\ndata: {json.dumps({'error': {'message': 'This server stops.'}})}\n\n"
    headers = {"Content-Type": "text/event-stream"}
    page.route("**/v1/images/batch", lambda route: route.fulfill(body=error, headers=headers))
    field(page, "Prompt").fill("a fox")
    page.get_by_label("Compare side by side").check()
    page.get_by_label("Values, with commas between them").fill("1, 2, 3")
    button(page, "Draw 3 side by side").click()
    expect(stage(page).get_by_text("This server stops.")).to_have_count(3)


def test_a_server_that_is_gone_and_comes_back(visit: Visit) -> None:
    visit.expect("ERR_CONNECTION_REFUSED", "failed: .*")
    page = visit.page
    page.route("**/v1/images/generations", lambda route: route.abort("connectionrefused"), times=1)
    draw(page, "a fox")
    expect(stage(page).get_by_role("alert")).to_contain_text("does not answer")
    button(page, "Try again").click()
    expect(kept(page)).to_have_count(1)


def test_a_server_that_dies_in_the_middle_and_is_started_again(visits: Visits, settings: Settings) -> None:
    facts = settings.model_copy(update={"port": free_port()})
    with Served(facts) as server:
        server.wait_ready()
        visit = visits(DESK, server.url)
        visit.expect("status of 503", "ERR_", "failed: ")
        page = arrive(visit).page
        draw(page, "!slow 60", Steps=20)
        expect(stage(page).get_by_text("step 1 of 20")).to_be_visible()
    expect(stage(page).get_by_role("alert")).to_contain_text("broke")
    draw(page, "a fox")
    expect(stage(page).get_by_role("alert").first).to_contain_text("does not answer")
    with Served(facts) as server:
        server.wait_ready()
        button(page, "Try again").first.click()
        expect(kept(page, "a fox")).to_have_count(1)


def test_one_of_two_is_cancelled_and_the_other_goes_on(page: Page) -> None:
    draw(page, "!slow 60", Steps=20)
    expect(stage(page).get_by_text("step 1 of 20")).to_be_visible()
    draw(page, "!slow 3", Steps=20)
    expect(stage(page).get_by_text("step 1 of 20")).to_have_count(2)
    button(page, "Cancel").last.click()
    expect(stage(page).get_by_text("cancelled")).to_have_count(1)
    expect(kept(page)).to_have_count(1)
    expect(stage(page).get_by_role("alert")).to_have_count(0)


def test_a_picture_of_one_whose_key_is_forgotten(visits: Visits) -> None:
    visit = arrive(visits(CLOSED))
    visit.expect("status of 401")
    page = visit.page
    draw(page, "a fox")
    expect(kept(page)).to_have_count(1)
    button(page, "Forget the key").click()
    expect(page.get_by_label("API key")).to_be_visible()
    button(page, "Use its settings").click()
    button(page, "Use this seed").click()
    button(page, "Edit").click()
    page.get_by_label("API key").fill(ALICE)
    page.get_by_role("button", name="Continue").click()
    expect(field(page, "Prompt")).to_have_value("a fox")


def test_metrics_that_never_come_hold_nothing_up(visit: Visit) -> None:
    page = visit.page
    visit.expect("failed: .*/metrics net::ERR_ABORTED")
    page.route("**/metrics", lambda route: None)
    draw(page, "a fox")
    expect(kept(page)).to_have_count(1)


def test_a_key_that_is_revoked_meanwhile_is_asked_for_again(visits: Visits) -> None:
    visit = arrive(visits(CLOSED))
    visit.expect("status of 401")
    page = visit.page
    wrong = {"status": 401, "json": {"error": {"message": "This key is not known.", "code": "invalid_api_key"}}}
    page.route("**/v1/images/generations", lambda route: route.fulfill(**wrong), times=1)
    draw(page, "a fox")
    page.get_by_label("API key").fill(ALICE)
    page.get_by_role("button", name="Continue").click()
    expect(field(page, "Prompt")).to_have_value("a fox")
    button(page, "Try again").click()
    expect(kept(page)).to_have_count(1)


def test_a_key_that_no_header_takes_is_not_sent(visits: Visits) -> None:
    visit = visits(CLOSED)
    visit.expect("status of 401")
    page = visit.open()
    for key in ("schlüssel", "sk alice", "😀"):
        page.get_by_label("API key").fill(key)
        page.get_by_role("button", name="Continue").click()
        assert not page.get_by_label("API key").evaluate("(input) => input.validity.valid")
    page.get_by_label("API key").fill(f" {ALICE} ")
    page.get_by_role("button", name="Continue").click()
    expect(button(page, "Draw")).to_be_visible()


REFUSED = "Object.defineProperty(window, '{}', {{ get() {{ throw new DOMException('no', 'SecurityError') }} }});"


def test_a_browser_that_refuses_all_storage_draws(visits: Visits) -> None:
    visit = visits(CLOSED)
    names = ("sessionStorage", "localStorage", "indexedDB")
    visit.context.add_init_script("".join(REFUSED.format(name) for name in names))
    page = arrive(visit).page
    draw(page, "a fox")
    expect(kept(page)).to_have_count(1)
    expect(page.get_by_text("gone after a reload")).to_be_visible()


def test_pictures_that_were_drawn_before_the_gallery_opened_stay_in_it(visits: Visits) -> None:
    visit = visits(DESK)
    visit.context.add_init_script("""
      const open = indexedDB.open.bind(indexedDB);
      indexedDB.open = (...words) => {
        const made = {};
        window.go = () => {
          const real = open(...words);
          for (const one of ["onsuccess", "onerror", "onupgradeneeded"]) real[one] = (event) => {
            made.result = real.result;
            made[one]?.(event);
          };
        };
        return made;
      };
    """)
    page = arrive(visit).page
    draw(page, "a fox")
    expect(kept(page)).to_have_count(1)
    page.evaluate("go()")
    page.wait_for_timeout(500)
    expect(kept(page)).to_have_count(1)


def test_a_clipboard_that_is_refused_has_another_way(page: Page) -> None:
    draw(page, "a fox")
    page.evaluate(
        "() => { navigator.clipboard.writeText = () => Promise.reject(new DOMException('no', 'NotAllowedError')); }"
    )
    page.evaluate("() => { document.execCommand = (name) => (window.copied = [name, document.activeElement.value]); }")
    button(page, "Copy as curl").first.click()
    expect(button(page, "Copied")).to_be_visible()
    name, text = page.evaluate("copied")
    assert name == "copy" and text.startswith("curl ")


def test_text_can_be_dragged_into_the_prompt(page: Page) -> None:
    prevented = page.evaluate("""() => {
      const dataTransfer = new DataTransfer();
      dataTransfer.setData("text/plain", "a fox");
      const options = { dataTransfer, bubbles: true, cancelable: true };
      const field = document.querySelector("textarea");
      return ["dragover", "drop"].map((name) => !field.dispatchEvent(new DragEvent(name, options)));
    }""")
    assert prevented == [False, False]


def test_a_source_that_changed_on_the_disk_is_said(page: Page) -> None:
    page.evaluate("""() => {
      FileReader.prototype.readAsDataURL = function () {
        setTimeout(() => this.onerror(new ProgressEvent("error")));
      };
    }""")
    drop(page, "a.png", "image/png", encode_image(np.zeros((16, 16, 3), np.uint8), "png", None, {}))
    button(page, "Draw from this picture").click()
    field(page, "Prompt").fill("a fox")
    button(page, "Draw from the picture").click()
    expect(stage(page).get_by_role("alert")).to_contain_text("can no longer be read")
