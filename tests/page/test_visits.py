"""The controls of the other tests: what goes wrong on a page is seen, and nothing is left out in silence."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.page.conftest import Visits
from tests.page.steps import arrive
from tests.parts.browser import PATIENCE, Look, chromium

pytestmark = pytest.mark.slow

FAULTS = {
    "console.error('oh')": "error: oh",
    "console.warn('hm')": "warning: hm",
    "setTimeout(() => { throw new Error('lost') })": "exception: .*lost",
    "Promise.reject(new Error('nobody caught it'))": "exception: .*nobody caught it",
    "fetch('v1/nothing')": "status of 404 .*/v1/nothing",
    "fetch('http://127.0.0.1:9/').catch(() => {})": "another host: http://127.0.0.1:9/",
    "fetch('http://127.0.0.1:9/a').catch(() => {})": "failed: http://127.0.0.1:9/a net::ERR_",
}


@pytest.mark.parametrize(("script", "line"), FAULTS.items(), ids=[*FAULTS.values()])
def test_a_fault_of_the_page_is_seen(visits: Visits, script: str, line: str) -> None:
    """Without the page's policy, which would keep it from other hosts."""
    visit = arrive(visits(Look(1280), bypass_csp=True))
    assert visit.surprises() == []
    visit.page.evaluate(f"() => {{ {script} }}")
    for _ in range(PATIENCE // 20):
        if any(re.search(line, fault) for fault in visit.surprises()):
            break
        visit.page.wait_for_timeout(20)
    assert any(re.search(line, fault) for fault in visit.surprises()), visit.faults
    visit.expect("")


@pytest.mark.parametrize("ci", ["", "true"])
def test_without_a_browser_it_is_said_what_is_not_tested(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ci: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setenv("CI", ci)
    kind = pytest.fail.Exception if ci else pytest.skip.Exception
    with pytest.raises(kind, match="the page at / is not tested: there is no Chromium"):
        chromium("the page at / is")
