"""/docs in a real browser without a network, and what it is made of."""

from __future__ import annotations

import html
import re
from pathlib import Path

import httpx
import pytest

from app.api import docs
from tests.api.browser import look

FILES = {"swagger-ui.css": "text/css", "swagger-ui-bundle.js": "text/javascript", "start.js": "text/javascript"}


def test_a_browser_shows_every_operation_and_needs_no_other_host(http: httpx.Client, url: str, tmp_path: Path) -> None:
    """Nothing is refused by the page's own policy, and nothing is missing."""
    seen = look(f"{url}/docs", tmp_path)
    shown = {path.replace("\u200b", "") for path in re.findall(r'data-path="([^"]+)"', seen.html)}
    assert shown == set(http.get("/openapi.json").json()["paths"])
    assert seen.console == []


@pytest.mark.slow
def test_a_browser_opens_an_operation_by_its_address(url: str, tmp_path: Path) -> None:
    """With the fields of a body, which the page draws from the document."""
    seen = look(f"{url}/docs#/images/create_image_v1_images_generations_post", tmp_path)
    assert "Try it out" in seen.html and "num_inference_steps" in seen.html and "Draw one image or several" in seen.html
    assert "Content Security Policy" not in str(seen.console)


CLICKS = b"""
const click = (selector, then) => setTimeout(() => { document.querySelector(selector).click(); then && then(); }, 1000);
click(".try-out__btn", () => click(".execute"));
"""


@pytest.mark.slow
def test_a_browser_asks_for_a_picture(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The page's own button, pressed by a script: its example is sent and the answer shown."""
    monkeypatch.setattr(docs, "START", docs.START + CLICKS)
    seen = look(f"{url}/docs#/images/create_image_v1_images_generations_post", tmp_path)
    shown = html.unescape(re.sub(r"<[^>]+>", "", seen.html))
    assert '"b64_json": "iVBOR' in shown and "x-request-id" in shown


@pytest.mark.slow
def test_what_the_page_may_not_do_is_seen(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control: a script in the page is not run, and a style from elsewhere not loaded."""
    planted = '<script>document.title = "ran"</script><link rel="stylesheet" href="http://127.0.0.1:9/a.css">'
    monkeypatch.setattr(docs, "PAGE", docs.PAGE.replace("</body>", f"{planted}</body>"))
    seen = look(f"{url}/docs", tmp_path)
    assert "<title>Instep</title>" in seen.html
    assert sum("Content Security Policy" in line for line in seen.console) == 2, seen.console


def test_the_page_is_not_inline_and_of_this_server_alone(http: httpx.Client) -> None:
    page = http.get("/docs")
    policy = page.headers["content-security-policy"]
    assert "default-src 'none'" in policy and "unsafe" not in policy and "http" not in policy and "*" not in policy
    assert "http" not in page.text and re.findall(r"<script[^>]*>(.*?)</script>", page.text) == ["", ""]
    for name in re.findall(r'(?:src|href)="docs/([^"]+)"', page.text):
        part = http.get(f"/docs/{name}")
        assert part.status_code == 200 and len(part.content) > 50
        assert part.headers["content-type"].partition(";")[0] == FILES.get(name, "image/png")
    for name in ("nothing.js", "__init__.py", "..%2Fmain.py", "%2Fetc%2Fpasswd"):
        assert http.get(f"/docs/{name}").json()["error"]["code"] == "not_found"
