"""Ten times the load for three seconds: counts and states. `python -m tests.faults.overload` has the times."""

from __future__ import annotations

import asyncio
from pathlib import Path

import httpx
import pytest

from tests.faults.overload import Flood
from tests.parts.servers import generate, real_server
from tests.parts.waiting import eventually

pytestmark = pytest.mark.slow

WANTED = {"model": "tiny-sd3", "prompt": "red apple", "num_inference_steps": 100, "seed": 1}
RATE, SECONDS = 120.0, 3.0


def outcomes(http: httpx.Client) -> dict[str, int]:
    """Requests for the model by their outcome."""
    found = {}
    for line in http.get("/metrics").text.splitlines():
        if line.startswith('instep_requests_total{model="tiny-sd3"'):
            found[line.split('"')[3]] = round(float(line.rsplit(" ", 1)[1]))
    return found


def test_what_is_refused_can_come_again_and_what_is_accepted_is_answered(tiny: Path, cache: Path) -> None:
    with real_server(models=tiny, cache=cache, preload="tiny-sd3", max_wait=1.0) as http:
        first = generate(http, WANTED, "image/png")
        answers = asyncio.run(Flood(str(http.base_url).rstrip("/"), WANTED).run(RATE, SECONDS))
        good = [answer for answer in answers if answer.status == 200]
        assert len(answers) > RATE and all(answer.status == 200 or answer.refused for answer in answers)
        for kept in (True, False):
            assert {answer.code for answer in answers if answer.kept is kept} == {"", "overloaded"}
        counts = {"answered": 1 + len(good), "refused": len(answers) - len(good), "failed": 0, "cancelled": 0}
        assert outcomes(http) == counts
        eventually(lambda: http.get("/health").json()["waiting"] == 0)
        again = generate(http, WANTED, "image/png")
        assert again.status_code == 200 and again.content == first.content
