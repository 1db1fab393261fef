"""A server with a card whose shared parts are not downloaded: it is not the default, not preloaded, and says so."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path

import httpx
import openai
import pytest
from typer.testing import CliRunner

from app.cli.commands import app
from tests.parts.servers import generate, real_server
from tests.parts.tiny import write_dit, write_sd3

OTTER = {"prompt": "A cute baby sea otter"}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a-tune: the user's, whose VAE is on the Hub; emoji-dit, emoji-mmdit, sd3.5-medium: shipped, the last is absent.

    The user's card is the first by the alphabet, and all that lies beside it is there.
    """
    folder = tmp_path_factory.mktemp("here") / "models"
    for name in ("a-tune", "emoji-mmdit", "sd3.5-medium"):
        write_sd3(folder / name, name=name)
    write_dit(folder / "emoji-dit")
    named = {"emoji-dit": ('id = "tiny-dit"', 'id = "emoji-dit"')}
    named["sd3.5-medium"] = ('source = { path = "." }', 'source = { repo = "lab/sd3.5-medium" }')
    named["a-tune"] = ("components = {  }", 'components = { vae = "sd3.5-medium/vae" }')
    for name, (before, after) in named.items():
        card = folder / name / "card.toml"
        assert before in card.read_text()
        card.write_text(card.read_text().replace(before, after))
    shutil.rmtree(folder / "a-tune" / "vae")
    return folder


@pytest.fixture(scope="module")
def real(models: Path) -> Iterator[httpx.Client]:
    """A client of a server that preloads all."""
    patch = pytest.MonkeyPatch()
    patch.setenv("HF_HUB_CACHE", str(models.parent / "hub"))
    patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(models.parent / "hub"))
    places = {"models": models, "cache": models.parent / "cache"}
    try:
        with real_server(preload="all", **places) as http:
            yield http
    finally:
        patch.undo()


@pytest.mark.slow
def test_it_is_ready_with_what_is_here(real: httpx.Client) -> None:
    entries = {entry["id"]: entry for entry in real.get("/v1/models").json()["data"]}
    assert next(iter(entries)) == "emoji-mmdit", "the default comes first"
    assert {name: (entry["downloaded"], entry["state"]) for name, entry in entries.items()} == {
        "emoji-mmdit": (True, "ready"),
        "emoji-dit": (True, "ready"),
        "a-tune": (False, "absent"),
        "sd3.5-medium": (False, "absent"),
    }


@pytest.mark.slow
def test_the_body_of_every_tutorial_draws_and_the_reply_names_who_drew(real: httpx.Client) -> None:
    reply = generate(real, OTTER)
    assert reply.status_code == 200 and reply.json()["model"] == "emoji-mmdit", reply.text
    raw = generate(real, OTTER, "image/png")
    assert raw.status_code == 200 and raw.headers["X-Model"] == "emoji-mmdit"
    with real.stream("POST", "/v1/images/generations", json={**OTTER, "stream": True}) as events:
        assert '"model":"emoji-mmdit"' in "".join(events.iter_text()).replace('": "', '":"')
    client = openai.OpenAI(base_url=f"{real.base_url}/v1", api_key="none")
    drawn = client.images.generate(**OTTER)
    assert drawn.data and drawn.data[0].b64_json and drawn.model_extra and drawn.model_extra["model"] == "emoji-mmdit"


@pytest.mark.slow
def test_a_panel_as_bytes_names_its_models(real: httpx.Client) -> None:
    body = {"models": ["emoji-mmdit"], "prompt": ["a red apple"], "num_inference_steps": 1}
    reply = real.post("/v1/images/compare", json=body, headers={"Accept": "image/png"})
    assert reply.status_code == 200 and reply.headers["X-Model"] == "emoji-mmdit", reply.text


@pytest.mark.slow
def test_who_asks_for_it_is_told_the_command(real: httpx.Client) -> None:
    reply = generate(real, {**OTTER, "model": "a-tune"})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "model_not_downloaded")
    assert reply.json()["error"]["message"] == "a-tune: its vae is not downloaded: run `instep models pull a-tune`"
    assert str(reply.request.url) and real.get("/readyz").status_code == 200


def test_the_command_line_agrees(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(models.parent / "hub"))

    def column(command: str, place: int) -> dict[str, str]:
        result = CliRunner().invoke(app, ["models", command, "--models", str(models)])
        assert result.exit_code == 0, result.output
        rows = (re.split(r"\s{2,}", line.strip()) for line in result.stdout.splitlines()[1:])
        return {row[0]: row[place] for row in rows}

    here = {"emoji-mmdit": "here", "emoji-dit": "here", "a-tune": "pull", "sd3.5-medium": "pull"}
    assert column("list", 4) == here
    assert column("check", 1) == {name: {"here": "ok", "pull": "absent"}[state] for name, state in here.items()}
    shown = CliRunner().invoke(app, ["models", "show", "a-tune", "--models", str(models)]).stdout
    assert "not here: instep models pull a-tune" in shown
