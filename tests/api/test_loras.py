"""LoRAs over HTTP, with the fake worker and a fake survey: what is listed, taken, refused, hidden and read again."""

from __future__ import annotations

import json
import logging
import os
import re
import sys
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from PIL import Image

from app.api import reload
from tests.api.test_edits import IMAGE
from tests.api.test_reload import NOTHING, Stand
from tests.parts.servers import ADMIN, ALICE, BOB, bearer
from tests.parts.waiting import eventually
from tests.parts.workers import SURVEY

CAROL = "sk-carol-5566778899"
VARIANT = """
id = "tiny-ink"
base = "tiny-text"
loras = [{ name = "ink", weight = 0.5 }]
aliases = ["inky"]
defaults = { num_inference_steps = 3 }
"""
INK = 'fits = ["tiny-text"]\ndescription = "black lines"\ntrigger_words = ["inkline"]\n'


def fill(folder: Path) -> Path:
    """LoRAs for both models, one with tensors that have no place, and one that fits no model."""
    folder.mkdir()
    files = {"ink": INK, "wash": 'fits = ["tiny-text", "tiny-label"]\n', "label": 'fits = ["tiny-label"]\n'}
    files |= {"half": 'fits = ["tiny-label"]\nunmatched = ["a.b", "a.c"]\n', "dora": 'problem = "is a DoRA"\n'}
    for name, text in files.items():
        (folder / f"{name}.safetensors").write_text(text, encoding="utf-8")
    return folder


class Studio(Stand):
    """A server with LoRAs and a variant of tiny-text. BOB's key is for tiny-label, the variant, and three LoRAs, and
    CAROL's for every model and one LoRA."""

    def prepare(self) -> None:
        self.loras = fill(self.models / "loras")
        (self.models / "tiny-ink").mkdir()
        (self.models / "tiny-ink" / "card.toml").write_text(VARIANT, encoding="utf-8")
        bob = f'key = "{BOB}"\nmodels = ["tiny-label", "tiny-ink"]\nloras = ["wash", "half", "dora"]'
        self.grant(alice=f'key = "{ALICE}"', bob=bob, carol=f'key = "{CAROL}"\nloras = ["wash"]')

    def post(self, key: str = ALICE, *, png: bool = False, **body: Any) -> httpx.Response:
        headers = bearer(key) | ({"Accept": "image/png"} if png else {})
        body = {"model": "tiny-text", "prompt": "a cat", "seed": 5, **body}
        return httpx.post(f"{self.server.url}/v1/images/generations", json=body, headers=headers)


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Studio]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reload, "SURVEY", SURVEY)
        studio, level = Studio(tmp_path_factory.mktemp("studio")), logging.getLogger().level
        with studio.server:
            studio.server.ready()
            yield studio
        logging.getLogger().setLevel(level)


def message(reply: httpx.Response, status: int = 400) -> str:
    assert reply.status_code == status, reply.text
    return str(reply.json()["error"]["message"])


def named(reply: httpx.Response) -> list[str]:
    return [one["name"] for one in reply.json()["data"]]


def test_they_are_listed_with_what_they_fit(studio: Studio) -> None:
    found = {one.pop("name"): one for one in studio.get("/v1/loras").json()["data"]}
    assert list(found) == ["dora", "half", "ink", "label", "wash"]
    fit = {"rank": 4, "modules": 6, "parts": ["transformer"], "bytes": 1234, "unmatched": []}
    ink = {"description": "black lines", "trigger_words": ["inkline"], "fits": {"tiny-text": fit}, "problem": ""}
    assert found["ink"] == ink and set(found["wash"]["fits"]) == {"tiny-label", "tiny-text"}
    assert found["half"]["fits"]["tiny-label"]["unmatched"] == ["a.b", "a.c"]
    assert found["dora"]["problem"] == "dora.safetensors: is a DoRA", "no folder of the server is shown"
    assert studio.get("/v1/models/tiny-text").json()["loras"] == ["ink", "wash"]
    assert studio.get("/v1/models").json()["data"][0]["loras"]


def test_a_request_may_ask_for_them(studio: Studio) -> None:
    asked = [{"name": "wash"}, {"name": "ink", "weight": -0.5}]
    sorted_ = [{"name": "ink", "weight": -0.5}, {"name": "wash", "weight": 1.0}]
    reply = studio.post(loras=asked)
    assert reply.json()["loras"] == sorted_ and "loras" not in studio.post().json()
    file = studio.post(loras=asked, png=True)
    text = Image.open(BytesIO(file.content)).info
    facts = json.loads(text["instep"])
    assert facts["loras"] == sorted_ and text["parameters"].startswith("a cat <lora:ink:-0.5> <lora:wash:1>\n")
    assert studio.post(png=True, **facts).content == file.content
    assert "label does not fit tiny-text; it fits tiny-label" in message(studio.post(loras=[{"name": "label"}]))
    assert "loras.0.name" in studio.post(loras=[{"name": "x"}]).json()["error"]["param"]


def test_a_comparison_has_them_in_every_cell(studio: Studio) -> None:
    body = {"models": ["tiny-text", "tiny-ink"], "prompt": "a", "loras": [{"name": "wash"}], "seed": 1}
    cells = httpx.post(f"{studio.server.url}/v1/images/compare", json=body, headers=bearer(ALICE)).json()["cells"]
    assert [[one["name"] for one in cell["loras"]] for cell in cells] == [["wash"], ["ink", "wash"]]
    wrong = {**body, "loras": [{"name": "label"}]}
    reply = httpx.post(f"{studio.server.url}/v1/images/compare", json=wrong, headers=bearer(ALICE))
    assert message(reply).startswith("tiny-text: loras.0.name: label does not fit tiny-text")


@pytest.mark.parametrize(
    "form",
    [
        {"loras": '[{"name": "ink", "weight": 0.5}, {"name": "wash"}]'},
        {"loras[]": ['{"name": "ink", "weight": 0.5}', '{"name": "wash"}']},
        {"loras[][name]": ["ink", "wash"], "loras[][weight]": ["0.5", "1"]},
    ],
)
def test_a_form_has_them_as_json_or_field_by_field(studio: Studio, form: dict[str, Any]) -> None:
    form = {"prompt": "a", "model": "tiny-text", **form}
    files = {"image": ("a.png", IMAGE)}
    reply = httpx.post(f"{studio.server.url}/v1/images/edits", data=form, files=files, headers=bearer(ALICE))
    assert reply.json()["loras"] == [{"name": "ink", "weight": 0.5}, {"name": "wash", "weight": 1.0}], reply.text


def test_a_name_in_a_form_may_look_like_a_number(studio: Studio) -> None:
    form, files = {"prompt": "a", "model": "tiny-text", "loras[][name]": "7"}, {"image": ("a.png", IMAGE)}
    reply = httpx.post(f"{studio.server.url}/v1/images/edits", data=form, files=files, headers=bearer(ALICE))
    assert message(reply).startswith('loras.0.name: there is no LoRA "7"')


def test_the_openai_client_sends_them(studio: Studio) -> None:
    client = openai.OpenAI(base_url=f"{studio.server.url}/v1", api_key=ALICE, max_retries=0)
    loras = [{"name": "ink", "weight": 0.5}, {"name": "wash", "weight": -1}]
    asked: dict[str, Any] = {"model": "tiny-text", "prompt": "a", "extra_body": {"loras": loras}}
    for reply in (client.images.generate(**asked), client.images.edit(image=("a.png", IMAGE), **asked)):
        assert reply.model_extra is not None and reply.model_extra["loras"] == loras


def test_a_key_may_be_limited_to_some(studio: Studio) -> None:
    assert named(studio.get("/v1/loras", BOB)) == ["dora", "half", "wash"]
    assert len(studio.get("/v1/loras", BOB).json()["data"][2]["fits"]) == 2
    hidden, absent = ({"model": "tiny-ink", "loras": [{"name": name}]} for name in ("ink", "oil"))
    first, second = (message(studio.post(BOB, **body)) for body in (hidden, absent))
    assert first.replace("ink", "oil") == second.replace("tiny-ink", "tiny-oil"), "it looks as if it did not exist"
    assert studio.post(BOB, model="tiny-ink", loras=[{"name": "wash"}]).status_code == 200
    for key, shown in ((ALICE, True), (CAROL, False), (BOB, False)):
        document = studio.get("/openapi.json", key).text
        assert '"wash"' in document and ('"ink"' in document) == shown
    assert named(studio.get("/v1/loras", CAROL)) == ["wash"]
    assert studio.get("/v1/models/tiny-text", CAROL).json()["loras"] == ["wash"]


def test_a_limited_key_learns_nothing_of_others(studio: Studio) -> None:
    """Neither from what is wrong with a LoRA or a variant, nor from the document of another key."""
    found = {one["name"]: one["problem"] for one in studio.get("/v1/loras", BOB).json()["data"]}
    assert found["dora"] == "fits no model", "its problem may name models"
    ink = studio.loras / "ink.safetensors"
    ink.rename(studio.loras / "inky.safetensors")
    studio.reload()
    hidden, shown = (message(studio.post(key, model="tiny-ink")) for key in (BOB, ALICE))
    assert hidden == 'model: there is no LoRA "ink"; tiny-ink takes wash' and '"inky"' in shown
    (studio.loras / "inky.safetensors").rename(ink)
    studio.reload()
    same = 'models = ["tiny-label"]\nloras = ["tiny-ink"]', 'models = ["tiny-label", "tiny-ink"]\nloras = ["x"]'
    (studio.loras / "tiny-ink.safetensors").write_text('fits = ["tiny-label"]\n', encoding="utf-8")
    before = studio.keys.read_text(encoding="utf-8")
    studio.grant(**{f"k{n}": f'key = "sk-same-55667788{n}"\n{entry}' for n, entry in enumerate(same)})
    studio.reload()
    documents = [studio.get("/openapi.json", f"sk-same-55667788{n}").json()["components"]["schemas"] for n in (0, 1)]
    assert ["ImageBody.tiny-ink" in schemas for schemas in documents] == [False, True]
    studio.keys.write_text(before, encoding="utf-8")
    (studio.loras / "tiny-ink.safetensors").unlink()
    studio.reload()


def test_the_document_has_the_fields_of_a_lora_that_are_shown(studio: Studio) -> None:
    fields = studio.get("/openapi.json").json()["components"]["schemas"]["Adapter"]
    assert set(fields["properties"]) == set(studio.get("/v1/loras").json()["data"][0])
    assert fields["required"] == ["name"]


def test_a_picture_has_eight_with_those_of_its_card(studio: Studio) -> None:
    names = [f"more-{number}" for number in range(8)]
    for name in names:
        (studio.loras / f"{name}.safetensors").write_text(INK, encoding="utf-8")
    studio.reload()
    more = [{"name": name} for name in names]
    assert len(studio.post(loras=more).json()["loras"]) == 8
    wanted = "loras: 9 with those of tiny-ink; a picture has at most 8"
    assert message(studio.post(model="tiny-ink", loras=more)) == wanted
    assert len(studio.post(model="tiny-ink", loras=more[1:]).json()["loras"]) == 8
    for name in names:
        (studio.loras / f"{name}.safetensors").unlink()
    studio.reload()


def test_a_variant_is_its_base_with_loras(studio: Studio) -> None:
    entry = studio.get("/v1/models/inky").json()
    assert (entry["id"], entry["base"], entry["family"]) == ("tiny-ink", "tiny-text", "sd3")
    assert entry["defaults"]["loras"] == [{"name": "ink", "weight": 0.5}]
    assert (entry["defaults"]["num_inference_steps"], entry["defaults"]["sampler"]) == (3, "flow_euler")
    reply = studio.post(model="tiny-ink").json()
    assert (reply["model"], reply["loras"]) == ("tiny-text", [{"name": "ink", "weight": 0.5}])
    assert reply["num_inference_steps"] == 3
    other = studio.post(model="tiny-ink", loras=[{"name": "ink", "weight": 2}, {"name": "wash"}]).json()["loras"]
    assert other == [{"name": "ink", "weight": 2.0}, {"name": "wash", "weight": 1.0}]
    assert "loras" not in studio.post(model="tiny-ink", loras=[{"name": "ink", "weight": 0}]).json()


def test_the_state_of_a_variant_is_that_of_its_base(studio: Studio) -> None:
    def state(name: str) -> str:
        return str(studio.get(f"/v1/models/{name}").json()["state"])

    assert state("tiny-ink") == "ready"
    for order, end in (("unload", "absent"), ("load", "ready")):
        reply = httpx.post(f"{studio.server.url}/v1/models/tiny-ink/{order}", headers=bearer(ADMIN))
        assert (reply.status_code, reply.json()["id"]) == (202, "tiny-ink")
        eventually(lambda end=end: state("tiny-ink") == state("tiny-text") == end)
    assert "tiny-ink" not in studio.get("/metrics").text


def test_a_reload_finds_what_changed(studio: Studio) -> None:
    problems = studio.reload()["problems"]
    assert studio.reload() == NOTHING | {"problems": problems}, "nothing changed"
    assert [(Path(one["file"]).name, one["reason"]) for one in problems] == [
        ("dora.safetensors", "dora.safetensors: is a DoRA"),
        ("half.safetensors", "2 tensors have no place in tiny-label, the first: a.b"),
    ]
    ink = studio.loras / "ink.safetensors"
    os.utime(ink, (1, 1))
    (studio.loras / "new.safetensors").write_text(INK, encoding="utf-8")
    assert studio.reload() == NOTHING | {"loras": ["ink", "new"], "problems": problems}
    assert "new" in named(studio.get("/v1/loras")) and studio.post(loras=[{"name": "new"}]).status_code == 200
    assert '"new"' in studio.get("/openapi.json").text
    ink.unlink()
    (studio.loras / "new.safetensors").unlink()
    found = studio.reload()
    assert found["loras"] == ["ink", "new"] and found["problems"][-1]["file"].endswith("tiny-ink/card.toml")
    wanted = 'model: there is no LoRA "ink"'
    assert message(studio.post(model="tiny-ink")).startswith(wanted), "the card is served, and says what it lacks"
    ink.write_text(INK, encoding="utf-8")
    assert studio.reload()["problems"] == problems and studio.post(model="tiny-ink").status_code == 200


def test_a_folder_that_is_gone_has_none(studio: Studio) -> None:
    aside, names = studio.models / "aside", named(studio.get("/v1/loras"))
    studio.loras.rename(aside)
    found = studio.reload()
    assert found["loras"] == names and found["problems"][0]["file"].endswith("tiny-ink/card.toml")
    assert named(studio.get("/v1/loras")) == [] and studio.post(model="tiny-ink").status_code == 400
    aside.rename(studio.loras)
    assert studio.reload()["loras"] == names and studio.post(model="tiny-ink").status_code == 200


def test_until_they_are_known_a_request_for_them_waits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "SURVEY", SURVEY)
    monkeypatch.setenv("INSTEP_FAKE_SURVEY", str(tmp_path / "go"))
    studio = Studio(tmp_path)
    with studio.server:
        eventually(lambda: studio.post().status_code == 200)
        for reply in (studio.post(loras=[{"name": "ink"}]), studio.post(model="tiny-ink"), studio.get("/v1/loras")):
            assert "still reads its LoRAs" in message(reply, 503) and int(reply.headers["retry-after"]) > 0
        assert studio.get("/readyz").status_code == 503 and not studio.get("/health").json()["ready"]
        (tmp_path / "go").touch()
        studio.server.ready()
        assert studio.post(loras=[{"name": "ink"}]).status_code == 200


def test_where_the_survey_fails_the_rest_is_served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reload, "SURVEY", (sys.executable, "-c", "open('/nowhere')"))
    studio = Studio(tmp_path)
    with studio.server:
        studio.server.ready()
        assert studio.post().status_code == 200
        assert "takes none of those here" in message(studio.post(loras=[{"name": "ink"}]))
        assert re.search(r"ended with 1: .*'/nowhere'$", studio.reload()["problems"][0]["reason"])
        monkeypatch.setattr(reload, "SURVEY", (sys.executable, "-c", "import time; time.sleep(1000)"))
        monkeypatch.setattr(reload, "SURVEY_SECONDS", 0.5)
        assert studio.reload()["problems"][0]["reason"] == "not read in 0.5 s"
