"""Names of models: aliases with slashes at every route, aliases from the settings, and what an unknown name hears."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args
from urllib.parse import urlsplit

import httpx
import openai
import pytest
from openai.types import ImageModel

from app.cards.cards import read_card, read_cards
from app.cards.catalog import Registry
from app.errors import CardError, SettingsError
from app.settings import Settings
from tests.parts.cards import TEXT
from tests.parts.servers import ADMIN, ALICE, BOB, Server, bearer, generate
from tests.parts.waiting import eventually

SLASHED = "Lab/Tiny-1.0"
ALIASES = f"{SLASHED}=tiny-text, dall-e-3=gpt-image-1,lab/labels/v2=tiny-label"
OPENAIS = [name for name in get_args(ImageModel) if name not in ("gpt-image-1", "dall-e-3")]
"""What OpenAI's client names, less the two that this server has as aliases."""


@pytest.fixture(scope="module")
def named(settings: Settings, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """A server with aliases of its settings, and with keys."""
    file = tmp_path_factory.mktemp("named") / "keys.toml"
    file.write_text(f'[keys.bob]\nkey = "{BOB}"\nmodels = ["lab/labels/v2"]\n', encoding="utf-8")
    keys = {"api_keys": f"alice={ALICE}", "api_keys_file": str(file), "admin_key": ADMIN}
    with Server(settings.model_copy(update={"alias": ALIASES, **keys})) as server:
        yield server.ready()


@pytest.fixture(scope="module")
def admin(named: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=named.url, headers=bearer(ADMIN), timeout=30) as http:
        yield http


@pytest.fixture(scope="module")
def bob(named: Server) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=named.url, headers=bearer(BOB), timeout=30) as http:
        yield http


@pytest.mark.parametrize("name", [SLASHED, SLASHED.replace("/", "%2F"), "tiny-text", "dall-e-3"])
def test_a_name_is_the_same_model_at_every_route(admin: httpx.Client, name: str) -> None:
    assert admin.get(f"/v1/models/{name}").json()["id"] == "tiny-text"
    assert admin.get(f"/v1/models/{name}/classes").json()["data"] == []
    assert admin.post(f"/v1/models/{name}/unload").json()["id"] == "tiny-text"
    eventually(lambda: admin.get(f"/v1/models/{name}").json()["state"] == "absent")
    assert admin.post(f"/v1/models/{name}/load").json()["id"] == "tiny-text"
    eventually(lambda: admin.get(f"/v1/models/{name}").json()["state"] == "ready")
    assert generate(admin, {"prompt": "a", "model": name.replace("%2F", "/")}).json()["model"] == "tiny-text"


def test_a_class_is_found_by_an_alias_of_two_slashes(admin: httpx.Client) -> None:
    found = admin.get("/v1/models/lab/labels/v2/classes", params={"q": "goldfish"}).json()["data"]
    assert found == [{"id": 1, "name": "goldfish"}]


def test_the_openai_client_finds_an_alias(named: Server) -> None:
    client = openai.OpenAI(base_url=f"{named.url}/v1", api_key=ALICE, max_retries=0)
    assert client.models.retrieve(SLASHED).id == "tiny-text"
    assert client.images.generate(prompt="a", model="dall-e-3").data


def test_aliases_are_listed(admin: httpx.Client, bob: httpx.Client) -> None:
    assert admin.get("/v1/models/tiny-text").json()["aliases"] == ["gpt-image-1", SLASHED, "dall-e-3"]
    assert admin.get("/v1/models/tiny-label").json()["aliases"] == ["lab/labels/v2"]
    bodies = admin.get("/openapi.json").json()["components"]["schemas"]
    assert {SLASHED, "dall-e-3"} <= set(bodies["ImageBody.tiny-text"]["properties"]["model"]["enum"])
    assert [model["id"] for model in bob.get("/v1/models").json()["data"]] == ["tiny-label"]


def test_aliases_of_hidden_models_are_hidden(bob: httpx.Client) -> None:
    for name in (SLASHED, "dall-e-3", "gpt-image-1"):
        for reply in (bob.get(f"/v1/models/{name}"), generate(bob, {"prompt": "a", "model": name})):
            assert (reply.status_code, reply.json()["error"]["code"]) == (404, "model_not_found")
            assert "tiny-text" not in reply.text
    assert SLASHED not in bob.get("/v1/models/Lab/Tiny-2.0").text.replace("Lab/Tiny-2.0", "")


@pytest.mark.parametrize(
    "path", ["/v1/models/", "/v1/models//classes", "/v1/models/%20", "/v1/models/nope/load", "/v1/models/a//b"]
)
def test_what_names_no_model_is_not_the_default(admin: httpx.Client, path: str) -> None:
    reply = admin.get(path)
    assert reply.status_code == 404 and reply.json()["error"]["code"] in ("not_found", "model_not_found")


@pytest.mark.parametrize("name", OPENAIS)
def test_a_model_of_openai_is_told_with_the_flag_that_would_serve_it(
    admin: httpx.Client, bob: httpx.Client, settings: Settings, name: str
) -> None:
    """At each route, and the flag that is printed is one that a server takes and that makes the name work."""
    for http, model in ((admin, "tiny-text"), (bob, "tiny-label")):
        for reply in (generate(http, {"prompt": "a", "model": name}), http.get(f"/v1/models/{name}")):
            assert reply.status_code == 404
            (flag,) = re.findall(r"--alias (\S+)", reply.json()["error"]["message"])
            assert flag == f"{name}={model}" and "INSTEP_ALIAS" in reply.text
    cards = read_cards(settings.models, f"{name}=tiny-text")
    assert Registry(cards, settings).find(name).id == "tiny-text"


def test_the_model_of_the_hint_draws_prompts(settings: Settings) -> None:
    """Also where the default does not: what is sent by this name is a prompt."""
    registry = Registry(read_cards(settings.models), settings.model_copy(update={"default_model": "tiny-label"}))
    assert "--alias dall-e-2=tiny-text " in registry.missing("dall-e-2").message


@pytest.mark.parametrize(
    ("setting", "said"),
    [
        ("a=nope", 'no card is named "nope"; there are tiny-label, tiny-text'),
        ("tiny-label=tiny-text", '"tiny-label" is a name of tiny-label already'),
        ("gpt-image-1=tiny-label", '"gpt-image-1" is a name of tiny-text already'),
        ("a=tiny-text,a=tiny-text", '"a" is a name of tiny-text already'),
        ("a=tiny-text,b=a", 'no card is named "a"'),
        ("a", '"a" is not alias=model'),
        ("a=", '"a=" is not alias=model'),
        ("=tiny-text", '"" is no alias'),
        ("a/load=tiny-text", '"a/load" is no alias'),
        ("/a=tiny-text", '"/a" is no alias'),
        ("a//b=tiny-text", '"a//b" is no alias'),
        ("a/../b=tiny-text", '"a/../b" is no alias'),
        (f"{'a' * 129}=tiny-text", "is no alias: 1 to 128"),
        ("a\u200b\x07=tiny-text", "is no alias"),
    ],
)
def test_an_alias_that_cannot_be_stops_the_start(settings: Settings, setting: str, said: str) -> None:
    with pytest.raises(SettingsError) as caught:
        read_cards(settings.models, setting)
    assert caught.value.message.startswith("alias: ") and said in caught.value.message and caught.value.param == "alias"
    assert len(caught.value.message) < 400


@pytest.mark.parametrize("setting", ["", " , ", "a=tiny-text,", " Stable Diffusion 3.5 = tiny-text "])
def test_spaces_and_commas_around_aliases_do_not_count(settings: Settings, setting: str) -> None:
    aliases = read_cards(settings.models, setting)["tiny-text"].aliases
    assert aliases == ("gpt-image-1", *[part.partition("=")[0].strip() for part in setting.split(",") if "=" in part])


@pytest.mark.parametrize("alias", ["", "a/classes", "a,b", "a=b", " a", "a/"])
def test_a_card_has_no_alias_that_no_address_reaches(tmp_path: Path, alias: str) -> None:
    (tmp_path / "card.toml").write_text(TEXT.replace('"gpt-image-1"', f'"{alias}"'), encoding="utf-8")
    with pytest.raises(CardError, match=r"aliases\.0: .*is no alias"):
        read_card(tmp_path / "card.toml")


def test_the_settings_for_open_webui_work(settings: Settings) -> None:
    """Its request with the values of docs/api.md: no response_format for gpt-image; a url would win over the file."""
    root = Path(__file__).parents[2]
    text = (root / "docs" / "api.md").read_text(encoding="utf-8")
    section = text.partition("## Open WebUI")[2].partition("\n## ")[0]
    rows = re.findall(r"^\| [A-Z].*? \| `(\w+)` \| (?:`([^`]+)`)?", section, re.MULTILINE)
    values = dict(rows)
    assert list(values) == [f"IMAGES_OPENAI_API_{name}" for name in ("BASE_URL", "KEY")] + [
        "IMAGE_GENERATION_MODEL",
        "IMAGE_SIZE",
    ]
    (flag,) = re.findall(r"--alias ([^\s`]+)", section)
    alias, _, model = flag.partition("=")
    assert alias == values["IMAGE_GENERATION_MODEL"] and alias in read_cards(root / "models", flag)[model].aliases
    assert urlsplit(values["IMAGES_OPENAI_API_BASE_URL"]).port == Settings.model_fields["port"].default
    with Server(settings.model_copy(update={"alias": "gpt-image-1.5=tiny-text"})) as server:
        url = f"{server.ready().url}{urlsplit(values['IMAGES_OPENAI_API_BASE_URL']).path}/images/generations"
        for name in (alias, "gpt-image-1.5"):
            body = {"model": name, "prompt": "a", "n": 1, "size": values["IMAGE_SIZE"]}
            (image,) = httpx.post(url, json=body, headers=bearer("any")).json()["data"]
            assert image["b64_json"] and not image.get("url")


@pytest.fixture
def spoken(named: Server, caplog: pytest.LogCaptureFixture) -> Any:
    caplog.set_level("INFO", logger="instep.access")
    return caplog


def test_a_slash_in_a_name_is_not_logged_as_a_route(admin: httpx.Client, spoken: pytest.LogCaptureFixture) -> None:
    """Another test's line may come after its answer: this one's is found by its id."""
    admin.get(f"/v1/models/{SLASHED}/classes", headers={"X-Request-ID": "slashed"})
    eventually(lambda: any("'slashed'" in str(record.msg) for record in spoken.records))
    (line,) = (str(record.msg) for record in spoken.records if "'slashed'" in str(record.msg))
    assert "'path': '/v1/models/{model}/classes'" in line
