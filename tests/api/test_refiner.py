"""`refiner` over HTTP with the fake worker: what is taken, refused, hidden from a key, listed, documented, logged."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from io import BytesIO
from typing import Any

import httpx
import jsonschema_rs
import pytest
from PIL import Image

from app.settings import Settings
from tests.api.test_access import lines
from tests.api.test_edits import IMAGE
from tests.parts.refiners import write_refiners
from tests.parts.servers import ALICE, BOB, Server, bearer
from tests.parts.waiting import eventually

FINE = {"model": "finer", "switch_at": 0.5}


@pytest.fixture(scope="module")
def studio(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with models that fit each other; BOB's key is for three of them."""
    folder = write_refiners(tmp_path_factory.mktemp("studio") / "models")
    keys = folder.parent / "keys.toml"
    keys.write_text(f'[keys.bob]\nkey = "{BOB}"\nmodels = ["base", "shared", "auto"]\n', encoding="utf-8")
    facts = {"api_keys": f"alice={ALICE}", "api_keys_file": str(keys), "devices": "cpu", "port": 0, "drain": 5}
    with Server(Settings(models=folder, **facts)) as server:
        yield server.ready()


def post(studio: Server, key: str = ALICE, route: str = "generations", *, png: bool = False, **body: Any) -> Any:
    headers = bearer(key) | ({"Accept": "image/png"} if png else {})
    body = {"model": "base", "prompt": "a cat", "seed": 5, **body}
    return httpx.post(f"{studio.url}/v1/images/{route}", json=body, headers=headers)


def error(reply: httpx.Response, status: int = 400) -> dict[str, Any]:
    assert reply.status_code == status, reply.text
    return dict(reply.json()["error"])


def test_a_reply_and_a_file_have_it(studio: Server, caplog: pytest.LogCaptureFixture) -> None:
    sizes = {"original_size": "512x256", "crop": [3, 4], "target_size": "640x480"}
    with caplog.at_level(logging.INFO):
        told = post(studio, refiner=FINE, **sizes).json()
        eventually(lambda: any(line.get("refiner") == "fine" for line in lines(caplog)))
    assert told["refiner"] == {"model": "fine", "switch_at": 0.5} and told.items() >= sizes.items()
    assert not {"refiner", *sizes} & post(studio).json().keys()
    file = post(studio, refiner=FINE, png=True, **sizes)
    assert file.headers["X-Model"] == "base, fine"
    text = Image.open(BytesIO(file.content)).info
    assert ", Refiner: fine, Refiner switch at: 0.5" in text["parameters"]
    facts = json.loads(text["instep"])
    assert facts["refiner"] == told["refiner"] and post(studio, png=True, **facts).content == file.content


def test_what_is_refused_names_the_field(studio: Server) -> None:
    wrong = error(post(studio, refiner={"model": "scaled"}))
    assert wrong["param"] == "refiner.model" and "scaling_factor is 1.25, not 1.5" in wrong["message"]
    assert error(post(studio, refiner={"model": "gone"}), 404)["param"] == "refiner.model"
    assert error(post(studio, refiner=FINE, size="64x64"))["param"] == "refiner"
    assert "refiner has both" in error(post(studio, refiner_checkpoint="fine"))["message"]


def test_a_key_needs_both_models(studio: Server) -> None:
    """One that it may not use is not there: neither in an error, nor in a list, nor in the document."""
    hidden, absent = (error(post(studio, BOB, refiner={"model": name}), 404) for name in ("fine", "feni"))
    assert hidden["message"].replace("fine", "feni") == absent["message"] and hidden["param"] == absent["param"]
    assert post(studio, BOB, refiner={"model": "shared"}).status_code == 200
    for key, names in ((ALICE, ["auto", "fine", "shared"]), (BOB, ["auto", "shared"])):
        get = httpx.Client(base_url=studio.url, headers=bearer(key)).get
        assert get("/v1/models/base").json()["refiners"] == names
        listed = {one["id"]: one["refiners"] for one in get("/v1/models").json()["data"]}
        assert listed["base"] == names and ("fine" in listed) == (key == ALICE)
        document = get("/openapi.json").json()
        checker = jsonschema_rs.validator_for(
            {"$ref": "#/components/schemas/ImageBody.base", "components": document["components"]}
        )
        for name in ("fine", "shared", "none"):
            assert checker.is_valid({"model": "base", "prompt": "a", "refiner": {"model": name}}) == (
                name in [*names, "none"]
            )


def test_the_default_of_a_card_is_listed_and_can_be_left_out(studio: Server) -> None:
    entry = httpx.get(f"{studio.url}/v1/models/auto", headers=bearer(ALICE)).json()
    assert entry["defaults"]["refiner"] == {"model": "fine", "switch_at": 0.5}
    assert post(studio, model="auto").json()["refiner"] == {"model": "fine", "switch_at": 0.5}
    assert "refiner" not in post(studio, model="auto", refiner={"model": "none"}).json()


def test_a_default_that_a_key_may_not_use_is_no_default_in_its_list(studio: Server) -> None:
    get = httpx.Client(base_url=studio.url, headers=bearer(BOB)).get
    for entry in (get("/v1/models/auto").json(), get("/v1/models").json()["data"][0]):
        assert entry["id"] == "auto" and "refiner" not in entry["defaults"] and '"fine"' not in json.dumps(entry)
    assert error(post(studio, BOB, model="auto"), 404)["message"].startswith(
        "refiner: this key may not use that of auto"
    )


@pytest.mark.parametrize(
    "form",
    [
        {"refiner": '{"model": "fine", "switch_at": 0.5}', "crop": "[3, 4]"},
        {"refiner[model]": "fine", "refiner[switch_at]": "0.5", "crop[]": ["3", "4"]},
    ],
)
def test_a_form_has_it_as_json_or_field_by_field(studio: Server, form: dict[str, Any]) -> None:
    form, files = {"prompt": "a", "model": "base", "size": "32x32", **form}, {"image": ("a.png", IMAGE)}
    reply = httpx.post(f"{studio.url}/v1/images/edits", data=form, files=files, headers=bearer(ALICE))
    assert reply.status_code == 200, reply.text
    assert reply.json()["refiner"] == {"model": "fine", "switch_at": 0.5} and reply.json()["crop"] == [3, 4]


def test_a_comparison_draws_with_it_where_it_fits(studio: Server) -> None:
    """The others are drawn without it, and the columns are in order of all parameters."""
    body = {"models": ["base", "shifted"], "prompt": "a", "seed": 1, "refiner": FINE, "model": None}
    told = post(studio, route="compare", **body).json()
    assert told["models"] == ["shifted", "base"]
    assert [cell["parameters"] for cell in told["cells"]] == [6_543_210, 2 * 6_543_210]
    assert [cell.get("refiner") for cell in told["cells"]] == [None, {"model": "fine", "switch_at": 0.5}]
    assert told["warnings"] == ["shifted: refiner is left out: finer does not fit"]
    own = post(studio, route="compare", **{**body, "models": ["base", "auto"], "refiner": None}).json()
    assert [cell.get("refiner") for cell in own["cells"]] == [None, {"model": "fine", "switch_at": 0.5}]


def test_a_comparison_that_no_model_takes_it_in_is_refused(studio: Server) -> None:
    body = {"models": ["shifted", "scaled"], "prompt": "a", "refiner": FINE, "model": None}
    assert error(post(studio, route="compare", **body))["param"] == "refiner.model"
    assert error(post(studio, route="compare", **{**body, "refiner": {"model": "gone"}}), 404)
    document = httpx.get(f"{studio.url}/openapi.json", headers=bearer(ALICE)).json()
    checker = jsonschema_rs.validator_for(
        {"$ref": "#/components/schemas/CompareBody.prompt", "components": document["components"]}
    )
    for models, fits in ((["shifted", "scaled"], False), (["shifted", "base"], True)):
        asked = {"models": models, "prompt": "a", "refiner": {"model": "fine", "switch_at": 0.5}}
        assert checker.is_valid(asked) == fits
