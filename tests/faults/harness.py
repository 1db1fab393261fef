"""A stage for faults: a real server under load, in which a fault lands in a chosen phase, and what is seen of it.

A fault is a function of a Stage with the decorator `fault`. `tests/faults/test_faults.py` runs each once,
`python -m tests.faults` as often as wanted. Files of this folder that have faults are named in FILES of `table.py`.
"""

from __future__ import annotations

import base64
import json
import os
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, Self

import httpx
import numpy as np
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families

from app.settings import Settings
from app.worker.supervisor import WORKER
from tests.parts import gated_worker
from tests.parts.close import BFLOAT16, close
from tests.parts.edits import as_field, half_mask, picture
from tests.parts.loras import write_lora
from tests.parts.servers import Served
from tests.parts.tiny import write_dit, write_flux, write_sd3
from tests.parts.waiting import eventually

MODELS = ("tiny-sd3", "tiny-dit", "tiny-flux")
FORMS: tuple[Form, ...] = ("json", "png", "stream")
WORDS = ("a red apple", "two dogs", "the sun over a house at night", "cat", "a blue door")
PATIENCE = 150.0
"""Seconds after which a client gives up. A fault that loses a request shows as that."""

Form = Literal["json", "png", "stream"]


@dataclass(frozen=True)
class Ask:
    """A request: the body, and in which form the answer is wanted."""

    body: dict[str, Any]
    form: Form = "json"

    @property
    def images(self) -> int:
        return int(self.body.get("n", 1))


@dataclass
class Reply:
    """An answer, read to its end at `at`, on the clock of `time.monotonic()`.

    pictures: uint8 [H, W, 3] by image. Of a stream, completed: images, previews: (image, number), in order of events.
    """

    status: int
    headers: httpx.Headers
    at: float
    code: str | None = None
    pictures: dict[int, np.ndarray] = field(default_factory=dict)
    completed: list[int] = field(default_factory=list)
    previews: list[tuple[int, int]] = field(default_factory=list)
    comments: list[str] = field(default_factory=list)


def mixed(count: int = 32) -> list[Ask]:
    """Requests of three models, in three forms."""
    return [_one(number, MODELS[number % 3], FORMS[number // 3 % 3]) for number in range(count)]


def _one(number: int, model: str, form: Form) -> Ask:
    subject = {"class_label": number % 10} if model == "tiny-dit" else {"prompt": WORDS[number % len(WORDS)]}
    body = {"model": model, "seed": 1000 + number, "num_inference_steps": 5 + number % 6, **subject}
    return Ask(body, form)


def edits(count: int) -> list[Ask]:
    """Requests as of `mixed` that start from a picture, three of four with a mask."""
    size = 32, 32
    start = {"image": as_field(picture(*size)), "strength": 0.7}
    mask = {"mask_image": as_field(half_mask(*size))}
    return [Ask(ask.body | start | (mask if number % 4 else {}), ask.form) for number, ask in enumerate(mixed(count))]


def adapted(count: int) -> list[Ask]:
    """Requests as of `mixed` and `edits` with one adapter, two at once, or every fifth with none."""
    asks = [*edits(count // 3), *mixed(count)[count // 3 :]]
    return [
        Ask(ask.body | ({"loras": _loras(ask, number)} if number % 5 else {}), ask.form)
        for number, ask in enumerate(asks)
    ]


def _loras(ask: Ask, number: int) -> list[dict[str, Any]]:
    names = [f"{ask.body['model']}-{one}" for one in ((0,), (1,), (0, 1), (1,))[number % 4]]
    return [{"name": name, "weight": 0.9 - 0.1 * (number % 3)} for name in names]


def send(url: str, ask: Ask, timeout: float = PATIENCE) -> Reply:
    """Send it and read the whole answer."""
    stream = {"stream": True, "partial_images": 2} if ask.form == "stream" else {}
    accept = "image/png" if ask.form == "png" else "*/*"
    route = f"{url}/v1/images/{'edits' if 'image' in ask.body else 'generations'}"
    got = httpx.post(route, json=ask.body | stream, headers={"Accept": accept}, timeout=timeout)
    reply = Reply(got.status_code, got.headers, time.monotonic())
    if got.headers["content-type"].startswith("text/event-stream"):
        for block in got.text.strip().split("\n\n"):
            _read_event(block, reply)
    elif got.headers["content-type"] == "image/png":
        reply.pictures[0] = pixels(got.content)
    elif got.status_code == 200:
        reply.pictures = {i: pixels(base64.b64decode(one["b64_json"])) for i, one in enumerate(got.json()["data"])}
    else:
        reply.code = got.json()["error"]["code"]
    return reply


def _read_event(block: str, reply: Reply) -> None:
    if block.startswith(":"):
        reply.comments.append(block.removeprefix(": "))
        return
    data = json.loads(block.partition("data: ")[2])
    if "error" in data:
        reply.code = data["error"]["code"]
        return
    image = data.get("image_index", 0)
    if data["type"].endswith(".completed"):
        reply.completed.append(image)
        reply.pictures[image] = pixels(base64.b64decode(data["b64_json"]))
    else:
        reply.previews.append((image, data["partial_image_index"]))


def pixels(file: bytes) -> np.ndarray:
    return np.asarray(Image.open(BytesIO(file)).convert("RGB"))


class Room:
    """The models of all stages, and what each request draws when it is alone on a server of its own."""

    def __init__(self, folder: Path, device: str = "cpu") -> None:
        self.folder, self.device, self._known, self._open = folder, device, {}, ExitStack()
        self._alone: Served | None = None
        for name, write in (("tiny-sd3", write_sd3), ("tiny-dit", write_dit)):
            write(folder / "models" / name)
        write_flux(folder / "models" / "tiny-flux", dev=False)
        for seed, name in enumerate((*MODELS, *MODELS)):
            only = {"only": r"^(transformer.*attn|text_encoder)"} if seed < len(MODELS) else {}
            write_lora(
                folder / "loras" / f"{name}-{seed // len(MODELS)}.safetensors",
                folder / "models" / name,
                seed=seed,
                **only,
            )
        for card in (folder / "models").glob("*/card.toml"):
            # Two images are decoded at once, so that a request of four is answered in two parts.
            card.write_text(card.read_text().replace("decode = 8", "decode = 2"))

    def settings(self, engines: int = 1, loras: bool = False, **changes: Any) -> Settings:
        """Of a server with so many engine processes, and with the adapters."""
        facts: dict[str, Any] = {
            "models": self.folder / "models", "cache": self.folder / "cache", "preload": "all", "port": 0, "drain": 20,
            "devices": ",".join([self.device] * engines), "dtype": "float32", "deterministic": True, "threads": 1,
        }  # fmt: skip
        return Settings(**facts | ({"loras": str(self.folder / "loras")} if loras else {}) | changes)

    def alone(self, ask: Ask) -> dict[int, np.ndarray]:
        """Its pictures by image, drawn with nobody beside it, in deterministic mode."""
        name = json.dumps(ask.body, sort_keys=True)
        if name not in self._known:
            if not self._alone:
                self._alone = self._open.enter_context(Served(self.settings(preload="", loras=True), WORKER))
                self._alone.wait_ready()
            reply = send(self._alone.url, Ask(ask.body))
            assert reply.status == 200, reply
            self._known[name] = reply.pictures
        return self._known[name]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._open.close()


class Stage:
    """A server in a process of its own, with engine processes that the faults reach.

    figures: what a fault measured: seconds until it was noticed and until all were answered, statuses, and counts.
    """

    def __init__(self, room: Room, **changes: Any) -> None:
        self.room, self.settings = room, room.settings(**changes)
        self.folder = Path(tempfile.mkdtemp(dir=room.folder))
        command = (sys.executable, "-P", gated_worker.__file__, str(self.folder))
        self.served = Served(self.settings, command)
        self.figures: dict[str, Any] = {}
        self.began = time.monotonic()

    def __enter__(self) -> Self:
        self.url = self.served.url
        self.served.wait_ready()
        return self

    def __exit__(self, *error: object) -> None:
        left = self.pids
        self.served.__exit__()
        for pid in left:  # one that is stopped does not see that the front is gone
            _signal(pid, signal.SIGKILL)

    @property
    def pids(self) -> list[int]:
        """Of the engine processes that there are."""
        front = self.served.process.pid
        try:
            children = map(int, Path(f"/proc/{front}/task/{front}/children").read_text().split())
        except OSError:
            return []
        return [pid for pid in children if _is_engine(pid)]

    def get(self, path: str) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=10)

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples of a metric that have these labels."""
        families = text_string_to_metric_families(self.get("/metrics").text)
        samples = [one for family in families for one in family.samples if one.name == f"instep_{name}"]
        assert samples, f"there is no metric {name}"
        return sum(one.value for one in samples if labels.items() <= one.labels.items())

    @property
    def ready(self) -> bool:
        return self.get("/readyz").status_code == 200

    @property
    def unanswered(self) -> int:
        """Images that are accepted and not answered."""
        health = self.get("/health").json()
        return int(health["running"] + health["waiting"])

    def arm(self, phase: str, count: int = 0) -> None:
        """The next process that begins this phase, after `count` times, will wait there."""
        (self.folder / "new").write_text(f"{phase} {count}")
        (self.folder / "new").rename(self.folder / "gate")

    def landed(self) -> int:
        """Wait until a process waits at the gate. Returns its id."""
        eventually(lambda: list(self.folder.glob("landed-*")), 100, lambda: f"nothing landed: {self.served.words}")
        return int(next(self.folder.glob("landed-*")).name.partition("-")[2])

    def release(self) -> None:
        """Let the process at the gate go on."""
        for file in self.folder.glob("landed-*"):
            file.unlink()

    def break_starts(self, broken: bool = True) -> None:
        """Let no engine process start any more, or again."""
        if broken:
            (self.folder / "broken").touch()
        else:
            (self.folder / "broken").unlink()

    def kill(self, pid: int, number: int = signal.SIGKILL) -> None:
        """Send the signal, and wait until the front has noticed."""
        live = self.total("workers_live")
        begin = time.monotonic()
        os.kill(pid, number)
        eventually(lambda: self.total("workers_live") < live, why=lambda: "the death was not noticed")
        self.began = time.monotonic()
        self.figures["noticed"] = max(self.figures.get("noticed", 0.0), self.began - begin)
        self.release()

    def recovered(self) -> None:
        """Wait until every device has its process again, and the models are loaded."""
        eventually(lambda: self.total("workers_live") == self.total("workers"), 100, pause=0.1)
        self.served.wait_ready()

    def restarts(self) -> int:
        return int(self.total("worker_restarts_total"))

    def end(self, number: int = signal.SIGTERM) -> float:
        """End the server as an orchestrator does; it must exit with 0. Returns the seconds that it took."""
        begin = time.monotonic()
        self.served.process.send_signal(number)
        assert self.served.ended() == (0, "returned\n"), self.served.words
        assert "Traceback" not in self.served.words, self.served.words
        return time.monotonic() - begin


class Load:
    """Requests that are all sent at once, each by a client of its own."""

    def __init__(self, stage: Stage, asks: Sequence[Ask]) -> None:
        self.stage, self.asks = stage, list(asks)
        stage.began = time.monotonic()
        pool = ThreadPoolExecutor(len(self.asks))
        self.futures: list[Future[Reply]] = [pool.submit(send, stage.url, ask) for ask in self.asks]
        pool.shutdown(wait=False)

    def settle(self) -> list[int]:
        """Wait until all are accepted and, with the engines at a gate, nothing moves. Returns who is unanswered."""

        def still() -> bool:
            waiting = sum(self.asks[number].images for number in self.open)
            return self.stage.unanswered == waiting == sum(self.asks[number].images for number in self.open)

        eventually(still, why=lambda: f"{self.stage.unanswered} unanswered, {len(self.open)} clients wait")
        return self.open

    @property
    def open(self) -> list[int]:
        return [number for number, future in enumerate(self.futures) if not future.done()]

    def replies(self) -> list[Reply]:
        """All answers, once they are there."""
        replies = [future.result(PATIENCE) for future in self.futures]
        figures, statuses = self.stage.figures, Counter(reply.code or reply.status for reply in replies)
        figures["answered"] = time.monotonic() - self.stage.began
        figures["statuses"] = {str(status): count for status, count in sorted(statuses.items(), key=str)}
        return replies

    def check(self, replies: Sequence[Reply], restarted: Iterable[int] = (), failed: Iterable[int] = ()) -> None:
        """All have the pictures that they have alone, but those that failed. restarted: streams that must say so."""
        asks, failed = self.asks, set(failed)
        wrong = {i: (reply.status, reply.code) for i, reply in enumerate(replies) if reply.status != 200 or reply.code}
        assert wrong.keys() == failed, wrong
        for number, (ask, reply) in enumerate(zip(asks, replies, strict=True)):
            if number not in failed:
                self._compare(ask, reply)
            if ask.form == "stream" and number not in failed:
                assert sorted(reply.completed) == list(range(ask.images))
                assert {index for _, index in reply.previews} == {0, 1}
        silent = [i for i in restarted if asks[i].form == "stream" and "restarted" not in replies[i].comments]
        assert not silent, f"streams {silent} did not say that they were restarted"

    def _compare(self, ask: Ask, reply: Reply) -> None:
        alone = self.stage.room.alone(ask)
        assert alone.keys() == reply.pictures.keys() and len(alone) == ask.images
        for index, wanted in alone.items():
            if self.stage.settings.deterministic:
                assert np.array_equal(reply.pictures[index], wanted), ask
            else:
                close(reply.pictures[index], wanted, BFLOAT16, of=ask)


def _is_engine(pid: int) -> bool:
    """Whether this child of a server is an engine process; others read pictures."""
    try:
        return b"gated_worker" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def _signal(pid: int, number: int) -> None:
    try:
        os.kill(pid, number)
    except ProcessLookupError:
        return


@dataclass(frozen=True)
class Fault:
    """A fault in words, what is done and asserted, and the settings of its server."""

    what: str
    run: Callable[[Stage], None]
    settings: dict[str, Any]

    def once(self, room: Room) -> dict[str, Any]:
        """Run it on a stage of its own. Returns its figures."""
        with Stage(room, **self.settings) as stage:
            self.run(stage)
            if stage.served.process.poll() is None:
                stage.figures["restarts"] = stage.restarts()
                stage.figures["replayed"] = int(stage.total("requests_replayed_total"))
                stage.end()
            return stage.figures


FAULTS: list[Fault] = []


def fault(what: str, **settings: Any) -> Callable[[Callable[[Stage], None]], Callable[[Stage], None]]:
    """Put a function into the table."""

    def put(run: Callable[[Stage], None]) -> Callable[[Stage], None]:
        FAULTS.append(Fault(what, run, settings))
        return run

    return put
