"""64 clients over real sockets, some of which leave: every request is answered or cancelled, and the books balance."""

from __future__ import annotations

import random
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import httpx

from app.request import Prompt
from tests.api.test_images import corner, opened
from tests.parts.fake_worker import colour
from tests.parts.servers import Server
from tests.parts.waiting import eventually

CLIENTS, ROUNDS = 64, 3


class Crowd:
    """Clients that ask, each in its own thread, and what became of each request."""

    def __init__(self, url: str) -> None:
        self.url = f"{url}/v1/images/generations"
        self.outcomes: Counter[str] = Counter()
        self.lock = threading.Lock()

    def client(self, number: int) -> None:
        dice = random.Random(number)
        with httpx.Client(timeout=60, verify=False) as http:
            for _ in range(ROUNDS):
                outcome = dice.choice((self.image, self.image, self.stream, self.leave, self.mistake))(http, dice)
                with self.lock:
                    self.outcomes[outcome] += 1

    def image(self, http: httpx.Client, dice: random.Random) -> str:
        prompt, seed = f"crowd {dice.random()}", dice.randrange(2**32)
        body = {"prompt": prompt, "seed": seed, "num_inference_steps": dice.randint(1, 20)}
        reply = http.post(self.url, json=body, headers={"Accept": "image/png"})
        assert reply.status_code == 200, reply.text
        assert corner(opened(reply.content)) == colour(Prompt(prompt), seed)
        return "answered"

    def stream(self, http: httpx.Client, dice: random.Random) -> str:
        body = {"model": "tiny-label", "class_label": dice.randrange(6), "stream": True, "partial_images": 2}
        text = http.post(self.url, json=body).text
        assert text.count("event: image_generation.completed") == 1
        return "answered"

    def leave(self, http: httpx.Client, dice: random.Random) -> str:
        body = {"prompt": "!slow 30", "num_inference_steps": 50, "stream": dice.random() < 0.5, "n": 2}
        try:
            http.post(self.url, json=body, timeout=dice.uniform(0.5, 1.0))
        except httpx.TimeoutException:
            return "cancelled"
        return "answered"

    def mistake(self, http: httpx.Client, dice: random.Random) -> str:
        assert http.post(self.url, json={"prompt": "a", "n": 0}).status_code == 400
        return "refused"


def test_sent_is_answered_plus_cancelled(server: Server, url: str, http: httpx.Client) -> None:
    before = totals(http)
    crowd = Crowd(url)
    with ThreadPoolExecutor(CLIENTS) as pool:
        list(pool.map(crowd.client, range(CLIENTS)))
    assert crowd.outcomes.total() == CLIENTS * ROUNDS
    assert min(crowd.outcomes[name] for name in ("answered", "cancelled", "refused")) > 5
    eventually(lambda: server.supervisor.running + server.supervisor.waiting == 0)
    eventually(lambda: totals(http)["cancelled"] - before["cancelled"] == crowd.outcomes["cancelled"])
    after = totals(http)
    assert {name: after[name] - before[name] for name in after} == dict(crowd.outcomes)
    gauges = [line for line in http.get("/metrics").text.splitlines() if line.startswith("instep_num_requests_")]
    assert len(gauges) == 8 and all(line.endswith(" 0.0") for line in gauges)


def totals(http: httpx.Client) -> Counter[str]:
    """Requests by outcome, from the server's own metrics."""
    found: Counter[str] = Counter(answered=0, cancelled=0, refused=0)
    for line in http.get("/metrics").text.splitlines():
        value = line.rsplit(" ", 1)[1]
        if line.startswith("instep_e2e_request_latency_seconds_count"):
            found["answered"] += int(float(value))
        elif line.startswith("instep_requests_failed_total") and 'reason="cancelled"' in line:
            found["cancelled"] += int(float(value))
        elif line.startswith("instep_requests_rejected_total"):
            found["refused"] += int(float(value))
    return found
