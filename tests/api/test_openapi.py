"""Our OpenAPI document by schemathesis: what it allows is served, what it forbids is refused, in its shapes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import httpx
import jsonschema_rs
import pytest

from app.cards.card import Card, Sizes
from app.cards.cards import read_cards
from app.cards.catalog import Registry
from app.jobs.schema import body_schema
from app.settings import Settings
from tests.jobs.test_body import TEXT_ERRORS
from tests.parts.servers import ADMIN, ALICE, BOB, Server, bearer, generate


@pytest.fixture
def text(settings: Settings) -> Card:
    return Registry(read_cards(settings.models), settings).default


UPLOADS = "edits|variations"


@pytest.mark.slow
@pytest.mark.parametrize(
    "chosen",
    [
        ["--exclude-path-regex", UPLOADS],
        # What it makes up is mostly no picture, and so refused.
        ["--include-path-regex", UPLOADS, "--exclude-checks", "positive_data_acceptance", "--warnings", "off"],
    ],
    ids=["bodies without files", "bodies with files"],
)
def test_the_server_keeps_to_its_document(closed: Server, tmp_path: Path, chosen: list[str]) -> None:
    """Every check of schemathesis, its own command line: valid bodies are served, invalid ones refused, no key is no
    entry, all conform. NOTE: one worker: CPython 3.11's parser, which hypothesis uses, fails at times in threads."""
    program = Path(sys.executable).with_name("schemathesis")
    options = ["--phases", "examples,coverage,fuzzing", "--max-examples", "10", "--workers", "1", "--seed", "1"]
    options += ["-H", f"Authorization: Bearer {ADMIN}", *chosen]
    command = [str(program), "run", f"{closed.url}/openapi.json", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout
    assert "No issues found" in done.stdout


def test_examples_of_the_document_work(http: httpx.Client) -> None:
    route = http.get("/openapi.json").json()["paths"]["/v1/images/generations"]["post"]
    examples = route["requestBody"]["content"]["application/json"]["examples"]
    assert set(examples) == {"tiny-text", "tiny-label"}
    for example in examples.values():
        assert generate(http, example["value"]).status_code == 200


def expressible(fields: dict[str, Any]) -> bool:
    """Whether JSON can say this: it has no infinity, no half of a surrogate pair."""
    try:
        json.dumps(fields, allow_nan=False, ensure_ascii=False).encode()
    except ValueError:
        return False
    return 10**400 not in fields.values()


@pytest.mark.parametrize("fields", [fields for fields, *_ in TEXT_ERRORS if expressible(fields)])
def test_what_the_server_refuses_the_document_forbids(text: Card, fields: dict[str, Any]) -> None:
    checker = jsonschema_rs.validator_for(body_schema(text, (text.id,), True))
    assert checker.is_valid({"prompt": "a"})
    assert not checker.is_valid({"prompt": "a", **fields})


def checker_of(http: httpx.Client, name: str) -> jsonschema_rs.Validator:
    """Checks bodies by a schema of the document."""
    components = http.get("/openapi.json").json()["components"]
    return jsonschema_rs.validator_for({"$ref": f"#/components/schemas/{name}", "components": components})


@pytest.mark.parametrize("route", ["Edit", "Variation"])
def test_the_bodies_with_a_picture(http: httpx.Client, route: str) -> None:
    for kind in ("Body", "Form"):
        checker = checker_of(http, f"{route}{kind}.tiny-text")
        good = {"image": "x", "prompt": "a", "strength": 0.01, "resize": "pad", "mask": "y", "overlay": False}
        assert checker.is_valid(good) and not checker.is_valid({**good, "denoising_strength": 0.5})
        assert not any(checker.is_valid({name: good[name] for name in good if name != left}) for left in ["image"])
        assert checker.is_valid({"image": "x"}) == (route == "Variation")
        bad = {"strength": [0, 1.01], "resize": ["fill"], "mask_blur": [-1, 65], "overlay": [1], "image": [None, []]}
        assert not any(checker.is_valid({**good, name: value}) for name, values in bad.items() for value in values)
        refused = [fields for fields, *_ in TEXT_ERRORS if expressible(fields) and "prompt" not in fields]
        assert refused and not any(checker.is_valid({**good, **fields}) for fields in refused)
    assert checker_of(http, f"{route}Body.tiny-text").is_valid({**good, "image": ["x"]})
    assert not checker_of(http, f"{route}Body.tiny-label").is_valid(good)


@pytest.mark.parametrize(
    ("sizes", "good", "bad"),
    [
        (Sizes(min=32, max=32, multiple=16), ["32x32"], ["16x32"]),
        (Sizes(min=16, max=64, multiple=16, square=True), ["16x16", "64x64"], ["16x32"]),
        (Sizes(min=256, max=1536, multiple=64), ["256x1536", "auto"], ["256x250", "1600x256", "256x256x"]),
    ],
)
def test_sizes_in_the_document(text: Card, sizes: Sizes, good: list[str], bad: list[str]) -> None:
    limits = text.limits.model_copy(update={"sizes": sizes})
    checker = jsonschema_rs.validator_for(body_schema(text.model_copy(update={"limits": limits}), (text.id,), True))
    assert all(checker.is_valid({"prompt": "a", "size": size}) for size in good)
    assert not any(checker.is_valid({"prompt": "a", "size": size}) for size in bad)


def test_the_document_says_which_key_a_route_takes(http: httpx.Client, closed: Server) -> None:
    paths = httpx.get(f"{closed.url}/openapi.json", headers=bearer(ALICE)).json()["paths"]
    routes = {path: operation for path, operations in paths.items() for operation in operations.values()}
    openly = {path for path, operation in routes.items() if "security" not in operation}
    assert openly == {"/healthz", "/readyz", "/metrics"}
    admins = {path for path, operation in routes.items() if operation.get("security") == [{"admin_key": []}]}
    assert admins == {"/v1/models/{model}/load", "/v1/models/{model}/unload", "/v1/reload"}
    assert {path for path in routes if "401" in routes[path]["responses"]} == routes.keys() - openly
    assert {path for path in routes if "403" in routes[path]["responses"]} == admins
    for route in ("generations", "edits", "variations"):
        assert {"401", "404", "429"} <= set(routes[f"/v1/images/{route}"]["responses"])
    assert "security" not in str(http.get("/openapi.json").json()["paths"])


def test_the_document_of_a_key_has_its_models_alone(closed: Server) -> None:
    for key, models in ((BOB, {"tiny-label"}), (ALICE, {"tiny-text", "tiny-label"})):
        document = httpx.get(f"{closed.url}/openapi.json", headers=bearer(key))
        names = {name for name in document.json()["components"]["schemas"] if name.startswith("ImageBody.")}
        assert names == {f"ImageBody.{model}" for model in models}
        assert ("tiny-text" in document.text) == ("tiny-text" in models)
