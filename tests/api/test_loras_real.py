"""LoRAs on a server with the real engine and the real survey: listed, drawn with, replaced on disk, read again."""

from __future__ import annotations

import shutil
from pathlib import Path

import httpx
import pytest

from tests.parts.loras import write_lora
from tests.parts.servers import ADMIN, bearer, generate, real_server

pytestmark = pytest.mark.slow


def picture(http: httpx.Client, **body: object) -> bytes:
    reply = generate(http, {"model": "tiny-sd3", "prompt": "a red apple", "seed": 1, **body}, "image/png")
    assert reply.status_code == 200, reply.text
    return reply.content.partition(b"IDAT")[2]


def test_a_server_finds_uses_and_reads_them_again(tiny: Path, tmp_path: Path) -> None:
    models, ink = tmp_path / "models", [{"name": "ink", "weight": 0.5}]
    shutil.copytree(tiny / "tiny-sd3", models / "tiny-sd3")
    file = write_lora(models / "loras" / "ink.safetensors", models / "tiny-sd3")
    (models / "inky").mkdir()
    card = 'id = "inky"\nbase = "tiny-sd3"\nloras = [{ name = "ink", weight = 0.5 }]\n'
    (models / "inky" / "card.toml").write_text(card, encoding="utf-8")
    with real_server(models=models, admin_key=ADMIN, preload="inky") as http:
        (found,) = http.get("/v1/loras").json()["data"]
        assert found["name"] == "ink" and found["fits"]["tiny-sd3"]["unmatched"] == []
        plain, drawn = picture(http), picture(http, loras=ink)
        assert plain != drawn == picture(http, model="inky")
        assert picture(http, model="inky", loras=[{"name": "ink", "weight": 0}]) == plain
        write_lora(file.with_name("new"), models / "tiny-sd3", seed=1).replace(file)
        reloaded = http.post("/v1/reload", headers=bearer(ADMIN)).json()
        assert (reloaded["loras"], reloaded["changed"]) == (["ink"], [])
        assert picture(http) == plain and picture(http, loras=ink) not in (plain, drawn)
        assert http.post("/v1/reload", headers=bearer(ADMIN)).json()["loras"] == []
