"""LoRAs behind a server with the real worker: twelve in the memory of three, and what happens changes no picture."""

from __future__ import annotations

import base64
import io
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest
from PIL import Image
from prometheus_client.parser import text_string_to_metric_families
from safetensors.numpy import load_file

from tests.parts.edits import as_field, half_mask, picture
from tests.parts.loras import write_lora
from tests.parts.servers import ADMIN, ALICE, INSTEP, Process, bearer
from tests.parts.waiting import eventually

pytestmark = pytest.mark.slow

MODEL, COUNT = "tiny-sd3", 12
NAMES = [f"style-{number:02}" for number in range(COUNT)]
EDIT = {"image": as_field(picture(32, 32)), "mask_image": as_field(half_mask(32, 32)), "strength": 0.7}


def write(folder: Path, tiny: Path, name: str, seed: int) -> Path:
    """Every third has a part for the text encoders."""
    only = {"only": r"^(transformer.*attn|text_encoder)"} if seed % 3 == 0 else {}
    return write_lora(folder / f"{name}.safetensors", tiny / MODEL, seed=seed, ranks=(8, 6), **only)


class Stand:
    """A server process on a folder of its own with a tiny SD3 and its LoRAs. memory: bytes that weights may take."""

    def __init__(self, tiny: Path, folder: Path, memory: int = 0) -> None:
        self.loras = folder / "models" / "loras"
        shutil.copytree(tiny / MODEL, folder / "models" / MODEL)
        for seed, name in enumerate(NAMES):
            write(self.loras, tiny, name, seed)
        words = ["serve", "--devices", "cpu", "--dtype", "float32", "--deterministic", "--port", "0", "--threads", "1"]
        words += ["--max-wait", "1000000", "--models", str(folder / "models"), "--cache", str(folder / "cache")]
        words += ["--device-memory", str(memory)] if memory else []
        keys = {"INSTEP_ADMIN_KEY": ADMIN, "INSTEP_API_KEYS": f"alice={ALICE}"}
        self.process = Process((*INSTEP, *words), **keys, XDG_CACHE_HOME=str(folder))

    def ask(self, body: dict[str, Any]) -> httpx.Response:
        route = "edits" if "image" in body else "generations"
        return httpx.post(f"{self.process.url}/v1/images/{route}", json=body, headers=bearer(ALICE), timeout=200)

    def draw(self, body: dict[str, Any]) -> np.ndarray:
        """uint8 [height, width, 3]."""
        reply = self.ask(body)
        assert reply.status_code == 200, reply.text
        return np.asarray(Image.open(io.BytesIO(base64.b64decode(reply.json()["data"][0]["b64_json"]))))

    def draw_all(self, bodies: list[dict[str, Any]]) -> list[np.ndarray]:
        """All at once."""
        with ThreadPoolExecutor(len(bodies)) as clients:
            return list(clients.map(self.draw, bodies))

    def reload(self) -> dict[str, Any]:
        reply = httpx.post(f"{self.process.url}/v1/reload", headers=bearer(ADMIN), timeout=100)
        assert reply.status_code == 200, reply.text
        return dict(reply.json())

    def total(self, name: str, **labels: str) -> float:
        """The sum of the samples of a metric that have these labels."""
        text = httpx.get(f"{self.process.url}/metrics", headers=bearer(ADMIN)).text
        samples = [one for family in text_string_to_metric_families(text) for one in family.samples]
        found = [one.value for one in samples if one.name == f"instep_{name}" and labels.items() <= one.labels.items()]
        assert found, f"there is no metric {name} {labels}"
        return sum(found)


def body(number: int, **changes: Any) -> dict[str, Any]:
    """A request with one adapter, two at once, or every tenth with none; some are guided, some edits."""
    names = {NAMES[number * 5 % COUNT], NAMES[number * 7 % COUNT]} if number % 4 == 0 else {NAMES[number % COUNT]}
    loras = [{"name": name, "weight": 0.9 - number % 3 / 2} for name in sorted(names)] if number % 10 != 9 else []
    made = {"model": MODEL, "prompt": f"red {number % 4}", "seed": number, "size": "32x32", "loras": loras}
    made |= {"num_inference_steps": 4 + number % 9, "guidance_scale": 4.0 * (number % 2)}
    return {**made, **(EDIT if number % 6 == 5 else {}), **changes}


@pytest.fixture(scope="module")
def plain(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """With room for everything."""
    stand = Stand(tiny, tmp_path_factory.mktemp("plain"))
    with stand.process:
        stand.process.wait_ready()
        yield stand


def size(file: Path) -> int:
    """Bytes of its tensors."""
    return sum(value.nbytes for value in load_file(file).values())


@pytest.fixture(scope="module")
def small(tiny: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stand]:
    """With room for the model and three of its adapters."""
    folder = tmp_path_factory.mktemp("small")
    sizes = [size(write(folder / "sizes", tiny, name, seed)) for seed, name in enumerate(NAMES)]
    model = sum(map(size, (tiny / MODEL).glob("*/*.safetensors")))
    assert 4 * min(sizes) > 3.1 * max(sizes)
    stand = Stand(tiny, folder, int(model + 3.1 * max(sizes)))
    with stand.process:
        stand.process.wait_ready()
        yield stand


def test_sixty_mixed_requests_for_twelve_adapters_in_the_memory_of_three(plain: Stand, small: Stand) -> None:
    """All at once, each with the picture that it has alone; and an engine that is killed in the middle changes none."""
    bodies = [body(number) for number in range(60)]
    alone = [plain.draw(one) for one in bodies]
    for found, wanted in zip(small.draw_all(bodies), alone, strict=True):
        assert np.array_equal(found, wanted)
    assert small.total("model_evictions_total") >= 9 and plain.total("model_evictions_total") == 0
    assert plain.total("batch_rows_sum") == plain.total("batch_rows_count"), "each was alone"
    assert small.total("batch_rows_sum") > 1.5 * small.total("batch_rows_count")


def test_a_killed_engine_changes_nothing(plain: Stand, small: Stand) -> None:
    bodies = [body(number, num_inference_steps=40 + number) for number in range(12)]
    alone = [plain.draw(one) for one in bodies]
    before = small.total("images_total")
    with ThreadPoolExecutor(1) as one:
        drawn = one.submit(small.draw_all, bodies)
        eventually(lambda: small.total("images_total") >= before + 2, 100)
        os.kill(engine(small), signal.SIGKILL)
        assert [np.array_equal(*pair) for pair in zip(drawn.result(), alone, strict=True)] == [True] * 12
    assert small.total("worker_restarts_total") == 1 and small.total("requests_replayed_total") > 0


def engine(stand: Stand) -> int:
    """The id of its engine process."""
    front = stand.process.process.pid
    children = Path(f"/proc/{front}/task/{front}/children").read_text().split()
    (pid,) = [one for one in children if b"app.worker.process" in Path(f"/proc/{one}/cmdline").read_bytes()]
    return int(pid)


def test_a_weight_of_zero_is_no_adapter_and_order_says_nothing(plain: Stand) -> None:
    none = plain.draw(body(9))
    zero = [{"name": NAMES[0], "weight": 0}, {"name": NAMES[4], "weight": 0.0}]
    assert np.array_equal(plain.draw(body(9, loras=zero)), none)
    two = [{"name": NAMES[0], "weight": 0.7}, {"name": NAMES[4], "weight": -0.4}]
    both = plain.draw(body(9, loras=two))
    assert np.array_equal(plain.draw(body(9, loras=two[::-1])), both)
    assert np.array_equal(plain.draw(body(9, loras=[*two, {"name": NAMES[7], "weight": 0}])), both)
    for other in (none, plain.draw(body(9, loras=two[:1])), plain.draw(body(9, loras=[{**two[0], "weight": 0.75}]))):
        assert np.abs(other.astype(int) - both).max() > 10


def test_a_reload_draws_what_comes_later_with_the_new_file(tiny: Path, small: Stand, tmp_path: Path) -> None:
    """What runs has the adapter that it began with; a reload that changes nothing changes no picture."""
    loras = [{"name": NAMES[1], "weight": 0.9}]
    slow = {"sampler": "flow_heun", "size": "64x64"}  # metrics come late, by a fifth of a second
    long, short = body(1, loras=loras, num_inference_steps=90, **slow), body(1, loras=loras, num_inference_steps=5)
    wanted, before = small.draw(long), small.draw(short)
    file = small.loras / f"{NAMES[1]}.safetensors"
    shutil.copy2(file, tmp_path / "old")
    with ThreadPoolExecutor(2) as clients:
        drawn = clients.submit(small.draw, long)
        eventually(lambda: small.total("num_requests_running") > 0, 60)
        os.rename(write(tmp_path, tiny, "new", 77), file)
        assert small.reload()["loras"] == [NAMES[1]]
        later = clients.submit(small.draw, short)
        assert np.array_equal(drawn.result(), wanted)
        assert not np.array_equal(later.result(), before)
    os.rename(tmp_path / "old", file)
    small.reload()
    assert np.array_equal(small.draw(short), before)
    assert small.reload()["loras"] == [] and np.array_equal(small.draw(short), before)


@pytest.mark.parametrize("spoil", [Path.unlink, lambda file: file.write_bytes(file.read_bytes()[:-8])])
def test_a_file_that_breaks_after_the_survey_is_one_error(
    tiny: Path, small: Stand, spoil: Callable[[Path], None]
) -> None:
    """Not yet read, or evicted before; the others serve, and a reload with the whole file ends it."""
    file = small.loras / f"{NAMES[3]}.safetensors"
    bad = body(3)
    good = [body(number) for number in (4, 9, 10, 11, 13)]
    wanted, before = small.draw(bad), small.draw_all(good)  # these need so many others that the first has left
    whole = file.read_bytes()
    spoil(file)
    reply = small.ask(bad)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (503, "lora_load_failed", f"loras.{NAMES[3]}")
    assert "cannot be loaded" in error["message"] and str(file) not in reply.text
    for found, one in zip(small.draw_all(good), before, strict=True):
        assert np.array_equal(found, one)
    file.write_bytes(whole)
    small.reload()
    assert np.array_equal(small.draw(bad), wanted)
