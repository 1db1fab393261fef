"""A minute of all that a service meets: pictures, edits, streams, clients that leave, mistakes, a rush, a bad model."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import httpx

from tests.deploy.stage import BROKEN

SAMPLERS = {"tiny-dit": ("ddim", "ddpm", "euler", "heun", "dpmpp_2m"), "tiny-sd3": ("flow_euler", "flow_heun")}
MODELS = ("tiny-dit", "tiny-dit-v", "tiny-sd3", "tiny-sd3-turbo", "tiny-sd3-no-t5")
MISTAKES: dict[str, bytes | dict[str, object]] = {
    "invalid_value": {"prompt": "a", "model": "tiny-sd3", "n": 0},
    "unknown_parameter": {"prompt": "a", "model": "tiny-sd3", "promt": "a"},
    "unsupported_parameter": {"prompt": "a", "model": "tiny-sd3", "response_format": "url"},
    "model_not_found": {"prompt": "a", "model": "no-such-model"},
    "invalid_json": b"{",
    "body_too_large": b" " * (2 << 20),
}
PICTURE = (Path(__file__).parents[2] / "docs" / "edit" / "apple.png").read_bytes()
LONG = {"model": "tiny-dit", "class_label": 1, "num_inference_steps": 250, "sampler": "ddpm", "n": 10}


class Traffic:
    """Clients in threads of their own. outcomes: how often each status, or "left", or "completed" streams."""

    def __init__(self, url: str) -> None:
        self.url = f"{url}/v1/images/generations"
        self.outcomes: Counter[str] = Counter()
        self._lock = threading.Lock()

    def run(self, seconds: float) -> None:
        """Everything at once for so long; the rush is in the middle."""
        until = time.monotonic() + seconds
        loops = [*[self.picture] * 4, self.edit, self.picture_stream, self.leave, self.mistake, self.broken]
        threads = [threading.Thread(target=self._loop, args=(loop, seed, until)) for seed, loop in enumerate(loops)]
        for thread in threads:
            thread.start()
        time.sleep(seconds / 2)
        self.rush()
        for thread in threads:
            thread.join()

    def _loop(self, act: Callable[[httpx.Client, random.Random], str], seed: int, until: float) -> None:
        dice = random.Random(seed)
        with httpx.Client(timeout=60) as http:
            while time.monotonic() < until:
                outcome = act(http, dice)
                with self._lock:
                    self.outcomes[outcome] += 1
                time.sleep(dice.uniform(0.0, 0.2))

    def picture(self, http: httpx.Client, dice: random.Random) -> str:
        body = self._body(dice)
        accept = dice.choice(("application/json", "image/png", "image/webp")) if body["n"] == 1 else "application/json"
        reply = http.post(self.url, json=body, headers={"Accept": accept})
        time.sleep(min(2.0, float(reply.headers.get("Retry-After", 0))))
        return str(reply.status_code)

    def edit(self, http: httpx.Client, dice: random.Random) -> str:
        form = {"model": "tiny-sd3", "prompt": f"a {dice.randrange(50)}"}
        url = self.url.replace("generations", "edits")
        return f"edit {http.post(url, data=form, files={'image': PICTURE}).status_code}"

    def picture_stream(self, http: httpx.Client, dice: random.Random) -> str:
        reply = http.post(self.url, json={**self._body(dice), "stream": True, "partial_images": 1})
        return "completed" if "image_generation.completed" in reply.text else str(reply.status_code)

    def leave(self, http: httpx.Client, dice: random.Random) -> str:
        time.sleep(0.5)
        return self._leaves(http, {**LONG, "n": 1}, dice.uniform(0.05, 0.3))

    def mistake(self, http: httpx.Client, dice: random.Random) -> str:
        body = dice.choice(list(MISTAKES.values()))
        reply = http.post(self.url, content=body) if isinstance(body, bytes) else http.post(self.url, json=body)
        time.sleep(0.5)
        return str(reply.status_code)

    def broken(self, http: httpx.Client, dice: random.Random) -> str:
        time.sleep(3)
        return str(http.post(self.url, json={"model": BROKEN, "class_label": 1}).status_code)

    def rush(self, most: int = 100, patience: float = 0.5) -> None:
        """Long requests, one after another until the queue is full; their clients leave."""

        def ask() -> None:
            with httpx.Client() as http:
                outcome = self._leaves(http, LONG, patience)
            with self._lock:
                self.outcomes[f"rush {outcome}"] += 1

        threads: list[threading.Thread] = []
        while len(threads) < most and not self.outcomes["rush 503"]:
            threads.append(threading.Thread(target=ask))
            threads[-1].start()
            time.sleep(0.05)
        for thread in threads:
            thread.join()

    def _leaves(self, http: httpx.Client, body: dict[str, object], patience: float) -> str:
        try:
            return str(http.post(self.url, json=body, timeout=httpx.Timeout(10, read=patience)).status_code)
        except httpx.TimeoutException:
            return "left"

    def _body(self, dice: random.Random) -> dict[str, object]:
        model = dice.choice(MODELS)
        what = {"class_label": dice.randrange(10)} if "dit" in model else {"prompt": f"a {dice.randrange(50)}"}
        how = {"num_inference_steps": dice.choice((1, 4, 8, 20)), "guidance_scale": dice.choice((0, 4.0))}
        sampler = {"sampler": dice.choice(SAMPLERS[model])} if model in SAMPLERS else {}
        return {"model": model, "n": dice.choice((1, 1, 2, 4)), **what, **how, **sampler}
