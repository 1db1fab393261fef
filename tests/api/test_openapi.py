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

from app.api.openapi import body_schema
from app.api.registry import Registry
from app.card import Card, Sizes, read_cards
from app.settings import Settings
from tests.api.conftest import generate
from tests.api.test_schemas import TEXT_ERRORS


@pytest.fixture
def text(settings: Settings) -> Card:
    return Registry(read_cards(settings.models), settings).default


def test_the_server_keeps_to_its_document(url: str, tmp_path: Path) -> None:
    """Every check of schemathesis, its own command line: valid bodies are served, invalid ones refused, all conform."""
    program = Path(sys.executable).with_name("schemathesis")
    options = ["--phases", "examples,coverage,fuzzing", "--max-examples", "10", "--workers", "4", "--seed", "1"]
    command = [str(program), "run", f"{url}/openapi.json", *options]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=110)
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
