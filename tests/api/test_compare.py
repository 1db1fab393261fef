"""POST /v1/images/compare on real sockets: what the panel shows, in which order; refusals, failures, leaving."""

from __future__ import annotations

import base64
import io
import json
import logging
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import numpy as np
import pytest
from PIL import Image

from app.jobs.compare import PRESETS, CompareReply
from app.jobs.job import Job
from app.request import ClassLabel, Prompt
from app.settings import Settings
from tests.api.test_access import lines
from tests.parts.cards import LABEL, LABELS, TEXT
from tests.parts.fake_worker import colour
from tests.parts.pictures import TYPE, properties
from tests.parts.servers import ALICE, BOB, Server, bearer
from tests.parts.tiny import write_json
from tests.parts.tiny_parts import write_vae
from tests.parts.waiting import eventually

CARDS = {
    "tiny-text": TEXT,
    "large-text": TEXT.replace("6_543_210", "8_056_627_520").replace('"gpt-image-1"', ""),
    "wide-text": TEXT.replace("parameters = 6_543_210\n", "").replace('"gpt-image-1"', "").replace("32x32", "64x32"),
    "guided-text": TEXT.replace('"sd3"', '"flux"\nguidance = "embedded"').replace('"gpt-image-1"', ""),
    "tiny-label": LABEL,
    "large-label": LABEL.replace("source", "parameters = 675_129_632\nsource"),
}
TWO = ["a red apple", "a blue car"]


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with the fake worker, six cards and two keys."""
    folder = tmp_path_factory.mktemp("compare") / "models"
    for name, card in CARDS.items():
        (folder / name).mkdir(parents=True)
        (folder / name / "card.toml").write_text(re.sub('id = "[a-z-]+"', f'id = "{name}"', card), encoding="utf-8")
        if "label" in name:
            write_json(folder / name / "model_index.json", {"id2label": {str(i): one for i, one in enumerate(LABELS)}})
    file = folder.parent / "keys.toml"
    file.write_text(f'[keys.bob]\nkey = "{BOB}"\nmodels = ["tiny-label"]\n', encoding="utf-8")
    keys = {"api_keys": f"alice={ALICE}", "api_keys_file": str(file)}
    with Server(Settings(models=folder, devices="cpu", preload="all", port=0, drain=5, max_wait=20, **keys)) as server:
        yield server.ready()


@pytest.fixture(scope="module")
def alice(several: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=several.url, timeout=30, headers=bearer(ALICE)) as http:
        yield http


def compare(http: httpx.Client, body: dict[str, object], accept: str = "application/json") -> httpx.Response:
    return http.post("/v1/images/compare", json=body, headers={"Accept": accept})


def shown(data: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


def test_rows_are_prompts_and_columns_models_by_their_parameters(alice: httpx.Client) -> None:
    models = ["wide-text", "large-text", "gpt-image-1", "large-text"]
    reply = compare(alice, {"models": models, "prompt": TWO, "seed": 7, "guidance_scale": 2})
    assert reply.status_code == 200, reply.text
    told = CompareReply.model_validate(reply.json())
    assert told.models == ["tiny-text", "large-text", "wide-text"]
    assert [(cell.row, cell.column, cell.model, cell.prompt) for cell in told.cells] == [
        (row, column, model, prompt) for row, prompt in enumerate(TWO) for column, model in enumerate(told.models)
    ]
    assert {cell.seed for cell in told.cells} == {7} and {cell.guidance_scale for cell in told.cells} == {2.0}
    assert [cell.parameters for cell in told.cells[:3]] == [6_543_210, 8_056_627_520, None]
    assert [cell.size for cell in told.cells[:3]] == ["32x32", "32x32", "64x32"]
    assert all(cell.timings.steps == 4 and cell.timings.cost for cell in told.cells)
    sheet = shown(base64.b64decode(told.data[0].b64_json))
    assert told.size == f"{sheet.shape[1]}x{sheet.shape[0]}" and told.usage.output_tokens == 2 * (4 + 4 + 8)
    first, second = (colour(Prompt(prompt), 7) for prompt in TWO)
    # NOTE: the fake worker paints prompt and seed, not model: three boxes of one colour make one row.
    rows = np.nonzero((sheet == first).all(axis=2))[0]
    below = np.nonzero((sheet == second).all(axis=2))[0]
    assert rows.max() < below.min() and len(rows) == len(below) == 2 * 128 * 128 + 256 * 128


def test_labels_over_models_of_classes(alice: httpx.Client) -> None:
    body = {"models": ["large-label", "tiny-label"], "class_label": ["goldfish", 5, "house finch"], "seed": 1}
    reply = compare(alice, body)
    assert reply.status_code == 200, reply.text
    told = reply.json()
    assert told["models"] == ["large-label", "tiny-label"]
    assert [cell["class_label"] for cell in told["cells"]] == [1, 1, 5, 5, 3, 3]
    sheet = shown(base64.b64decode(told["data"][0]["b64_json"]))
    tops = []
    for index in (1, 5, 3):
        rows, columns = np.nonzero((sheet == colour(ClassLabel(index), 1)).all(axis=2))
        tops.append(rows.min())
        assert len(rows) == 2 * 256 * 256 and columns.max() - columns.min() >= 2 * 256
    assert tops == sorted(tops)


def test_the_file_alone_carries_the_request_that_makes_it_again(alice: httpx.Client) -> None:
    body = {"models": ["large-text", "tiny-text"], "prompt": TWO, "negative_prompt": "worm", "size": "48x32"}
    reply = compare(alice, {**body, "user": "me"}, "image/png")
    assert (reply.status_code, reply.headers["content-type"]) == (200, "image/png")
    image = Image.open(io.BytesIO(reply.content))
    image.load()
    facts = json.loads(image.text["instep"])
    assert facts == {**body, "models": ["tiny-text", "large-text"], "seed": int(reply.headers["x-seed"])}
    assert image.text["parameters"].startswith("a red apple\na blue car\nNegative prompt: worm\nSeed: ")
    assert TYPE in properties(reply.content)
    assert compare(alice, facts, "image/png").content == reply.content
    assert compare(alice, {**facts, "seed": 1}, "image/png").content != reply.content


@pytest.mark.parametrize("format", ["jpeg", "webp"])
def test_other_formats(alice: httpx.Client, format: str) -> None:
    body = {"models": ["tiny-text"], "prompt": "a"}
    assert Image.open(io.BytesIO(compare(alice, body, f"image/{format}").content)).format == format.upper()
    told = compare(alice, {**body, "output_format": format}).json()
    assert told["output_format"] == format
    assert Image.open(io.BytesIO(base64.b64decode(told["data"][0]["b64_json"]))).format == format.upper()


def test_a_letter_that_the_panel_cannot_show_is_a_warning(alice: httpx.Client) -> None:
    told = compare(alice, {"models": ["tiny-text"], "prompt": ["苹果", "apple"]}).json()
    assert told["warnings"] == ["the panel shows boxes for letters that its font does not have: 苹果"]
    assert "warnings" not in compare(alice, {"models": ["tiny-text"], "prompt": "apple"}).json()


def test_the_preset_brings_prompts_steps_and_guidance(alice: httpx.Client) -> None:
    told = compare(alice, {"preset": "two_prompts", "models": ["large-text", "tiny-text"], "guidance_scale": 5}).json()
    assert [cell["prompt"] for cell in told["cells"][::2]] == PRESETS["two_prompts"]["prompt"]
    assert {(cell["num_inference_steps"], cell["guidance_scale"]) for cell in told["cells"]} == {(28, 5.0)}
    told = compare(alice, {"preset": "two_prompts", "models": ["tiny-text"]}).json()
    assert {(cell["num_inference_steps"], cell["guidance_scale"]) for cell in told["cells"]} == {(28, 7.0)}


def test_without_models_the_preset_takes_those_that_are_downloaded(several: Server, alice: httpx.Client) -> None:
    reply = compare(alice, {"preset": "two_prompts"})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "models")
    assert "0 models that take the preset two_prompts are downloaded here" in reply.text
    folder = Path(several.app.state.front.settings.models)
    for name in ("large-text", "wide-text", "tiny-label"):
        write_json(folder / name / "model_index.json", {"vae": ["diffusers", "AutoencoderKL"], "id2label": {}})
        write_vae(folder / name / "vae", 1)
    assert compare(alice, {"preset": "two_prompts"}).json()["models"] == ["large-text", "wide-text"]


BAD: list[tuple[dict[str, Any], str, str]] = [
    ({"models": None}, "models", "models: is required"),
    ({"models": []}, "models", "expects a list of 1 to 8 model ids"),
    ({"models": ["tiny-text"] * 9}, "models", "at most 8 entries, not 9"),
    ({"models": "tiny-text"}, "models", "models: expects a list of 1 to 8 model ids"),
    ({"models": [""]}, "models", "none of them empty"),
    ({"models": [7]}, "models", "models: expects a list of 1 to 8 model ids"),
    ({"prompt": None}, "prompt", "prompt: a comparison has one of prompt"),
    ({"prompt": []}, "prompt", "1 to 16 rows, not 0"),
    ({"prompt": ["a"] * 17}, "prompt", "1 to 16 rows, not 17"),
    ({"prompt": ["a", 7]}, "prompt", "prompt: "),
    ({"class_label": 1}, "class_label", "class_label: a comparison has one of prompt"),
    ({"prompt": None, "class_label": 1}, "class_label", "tiny-text: class_label: tiny-text draws a prompt"),
    ({"models": ["tiny-text", "tiny-label"]}, "prompt", "tiny-label: prompt: this model draws classes"),
    ({"size": "128x128"}, "size", 'tiny-text: size: tiny-text has no size "128x128"'),
    ({"sampler": "ddim"}, "sampler", "tiny-text: sampler: "),
    ({"num_inference_steps": 51}, "num_inference_steps", "tiny-text: num_inference_steps: expects 1 to 50"),
    ({"prompt": ["a", "b" * 201]}, "prompt", "tiny-text: prompt: 201 characters"),
    ({"stream": True}, "stream", "stream: a comparison comes as a whole"),
    ({"n": 2}, "n", 'Unknown field "n"'),
    ({"model": "tiny-text"}, "model", 'did you mean "models"'),
    ({"steps": 4}, "steps", 'did you mean "num_inference_steps"'),
    ({"preset": "two_prompts"}, "prompt", "prompt: a comparison has one of prompt"),
    ({"preset": "three", "prompt": None}, "preset", "preset: expects one of two_prompts"),
    ({"seed": -2}, "seed", "seed: expects -1 to"),
    ({"output_format": "gif"}, "output_format", "output_format: expects one of"),
    ({"output_compression": 101}, "output_compression", "output_compression: expects 0 to 100"),
    ({"deadline": 0}, "deadline", "deadline: expects 0.1 to 86400"),
    ({"seed": "7"}, "seed", "seed: expects a whole number"),
]


def checker_of(http: httpx.Client) -> Any:
    """What the document says of a comparison's body."""
    document = http.get("/openapi.json").json()
    schema = document["paths"]["/v1/images/compare"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    return jsonschema_rs.validator_for({**schema, "components": document["components"]})


@pytest.mark.parametrize(("fields", "param", "said"), BAD, ids=[f"{param}-{i}" for i, (_, param, _) in enumerate(BAD)])
def test_a_bad_comparison_names_the_field_and_the_model(
    several: Server, alice: httpx.Client, fields: dict[str, Any], param: str, said: str
) -> None:
    reply = compare(alice, {"models": ["tiny-text"], "prompt": "a", **fields})
    error = reply.json()["error"]
    assert (reply.status_code, error["param"]) == (400, param) and said in error["message"], error
    assert ("tiny-text: " in error["message"]) == ("tiny-text: " in said)
    assert several.supervisor.running + several.supervisor.waiting == 0
    checker = checker_of(alice)
    assert checker.is_valid({"models": ["tiny-text"], "prompt": "a"})
    assert checker.is_valid({"models": ["wide-text", "gpt-image-1"], "prompt": ["a", "b"], "size": "48x32"})
    assert not checker.is_valid({"models": ["tiny-text"], "prompt": "a", **fields})


def test_the_examples_of_the_document_work(alice: httpx.Client) -> None:
    route = alice.get("/openapi.json").json()["paths"]["/v1/images/compare"]["post"]
    examples = route["requestBody"]["content"]["application/json"]["examples"]
    assert set(examples) == {"prompt", "class_label", "two_prompts"} and "labelled panel" in route["description"]
    for example in examples.values():
        assert compare(alice, example["value"]).status_code == 200, example


def test_a_field_that_one_model_does_not_have_is_no_field_of_both(alice: httpx.Client) -> None:
    """Only guided-text has embedded guidance, and so a true_cfg_scale."""
    body = {"models": ["guided-text"], "prompt": "a", "true_cfg_scale": 2}
    checker = checker_of(alice)
    assert compare(alice, body).status_code == 200 and checker.is_valid(body)
    reply = compare(alice, body | {"models": ["guided-text", "tiny-text"]})
    assert "tiny-text: true_cfg_scale: " in reply.json()["error"]["message"]
    assert not checker.is_valid(body | {"models": ["guided-text", "tiny-text"]})


def test_pictures_are_bounded_together(alice: httpx.Client, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.jobs.compare.PIXELS", 3 * 32 * 32)
    body = {"models": ["tiny-text", "large-text"], "prompt": TWO}
    assert "4 pictures have 0 megapixels together" in compare(alice, body).json()["error"]["message"]
    assert compare(alice, {**body, "models": ["tiny-text"]}).status_code == 200


def test_a_key_compares_the_models_that_it_is_given(several: Server) -> None:
    with httpx.Client(base_url=several.url, headers=bearer(BOB)) as bob:
        assert compare(bob, {"models": ["tiny-label"], "class_label": 1}).status_code == 200
        for name in ("large-label", "nothing"):
            reply = compare(bob, {"models": ["tiny-label", name], "class_label": 1})
            error = reply.json()["error"]
            assert (reply.status_code, error["code"], error["param"]) == (404, "model_not_found", "model")
            assert error["message"] == f'There is no model "{name}"; there are tiny-label'
        assert "tiny-text" not in json.dumps(bob.get("/openapi.json").json()["components"])


def outcomes(http: httpx.Client, model: str) -> dict[str, float]:
    found = re.findall(rf'instep_requests_total{{model="{model}",outcome="(\w+)"}} ([\d.]+)', http.get("/metrics").text)
    return {outcome: float(count) for outcome, count in found}


def grown(http: httpx.Client, model: str, before: dict[str, float]) -> dict[str, float]:
    after = outcomes(http, model)
    return {name: after[name] - before.get(name, 0) for name in after if after[name] != before.get(name, 0)}


def idle(server: Server) -> bool:
    return server.supervisor.running + server.supervisor.waiting == 0


def test_every_cell_is_counted_and_the_log_tells_of_all(
    alice: httpx.Client, several: Server, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger="instep.access")
    before = {name: outcomes(alice, name) for name in ("tiny-text", "large-text")}
    reply = compare(alice, {"models": ["tiny-text", "large-text"], "prompt": TWO, "seed": 3})
    assert reply.status_code == 200
    assert all(grown(alice, name, counts) == {"answered": 2.0} for name, counts in before.items())
    mine = reply.headers["x-request-id"]
    eventually(lambda: any(line["request_id"] == mine for line in lines(caplog)))
    (line,) = [line for line in lines(caplog) if line["request_id"] == mine]
    facts = {"status": 200, "models": ["tiny-text", "large-text"], "images": 4, "seed": 3, "key": "alice"}
    assert {name: line[name] for name in facts} == facts and line["denoise_ms"] > 0 and line["image_encode_ms"] > 0
    assert "apple" not in json.dumps(line)


def test_one_cell_that_fails_fails_the_whole_and_cancels_the_rest(alice: httpx.Client, several: Server) -> None:
    before = outcomes(alice, "tiny-text")
    body = {"models": ["tiny-text"], "prompt": ["!slow 60", "!nan", "!slow 60"], "num_inference_steps": 50}
    reply = compare(alice, body)
    error = reply.json()["error"]
    assert (reply.status_code, error["code"], error["param"]) == (500, "non_finite_output", "models.tiny-text")
    eventually(lambda: idle(several))
    assert grown(alice, "tiny-text", before) == {"failed": 1.0, "cancelled": 2.0}


def test_a_client_that_leaves_cancels_all_cells(alice: httpx.Client, several: Server) -> None:
    before = outcomes(alice, "large-text")
    with pytest.raises(httpx.ReadTimeout):
        body = {"models": ["large-text", "tiny-text"], "prompt": ["!slow 60", "!slow 61"], "num_inference_steps": 50}
        alice.post("/v1/images/compare", json=body, timeout=0.4)
    eventually(lambda: idle(several) and grown(alice, "large-text", before) == {"cancelled": 2.0})


def test_a_cell_that_is_refused_takes_the_others_with_it(
    alice: httpx.Client, several: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where the queue is full already, all are refused with a time to come again; none is left running."""
    before = {name: outcomes(alice, name) for name in ("tiny-text", "large-text")}
    inner, calls = several.supervisor.submit, []

    def submit(job: Job, **more: Any) -> Job:
        calls.append(job.request)
        if len(calls) == 4:
            several.supervisor.closing = True
        try:
            return inner(job, **more)
        finally:
            several.supervisor.closing = False

    monkeypatch.setattr(several.supervisor, "submit", submit)
    reply = compare(alice, {"models": ["tiny-text", "large-text"], "prompt": ["!slow 60", "!slow 61"]})
    assert (reply.status_code, reply.json()["error"]["code"]) == (503, "shutting_down")
    assert len({request.id for request in calls}) == 4 and len({one.images[0].seed for one in calls}) == 1
    eventually(lambda: idle(several))
    assert grown(alice, "tiny-text", before["tiny-text"]) == {"cancelled": 2.0}
    assert grown(alice, "large-text", before["large-text"]) == {"cancelled": 1.0, "refused": 1.0}


def test_more_work_than_may_wait_is_no_matter_of_time(
    alice: httpx.Client, several: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Costs are planted: at 6 seconds a picture and 20 that may wait, no later moment takes sixteen of them."""
    monkeypatch.setattr("app.worker.admission.Backlog.image", lambda backlog, kind: 6.0)
    reply = compare(alice, {"models": ["tiny-text"], "prompt": [f"!slow {i}" for i in range(16)]})
    assert (reply.status_code, reply.json()["error"]["param"]) == (400, "models")
    assert re.search(r"the first \d+ of 16 pictures are \d+ seconds of work already, and 20 may wait", reply.text)
    eventually(lambda: idle(several))


def test_the_same_seed_is_drawn_for_all_cells_when_there_is_none(alice: httpx.Client) -> None:
    seeds = [
        {cell["seed"] for cell in compare(alice, {"models": ["tiny-text"], "prompt": TWO}).json()["cells"]}
        for _ in range(2)
    ]
    assert all(len(one) == 1 for one in seeds) and seeds[0] != seeds[1]
