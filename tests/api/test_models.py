"""The model routes, read by the openai client and by hand."""

from __future__ import annotations

import httpx
import openai
import pytest

from tests.parts.servers import generate


def test_the_openai_client_lists_models(url: str) -> None:
    client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
    models = client.models.list().data
    assert [model.id for model in models] == ["tiny-text", "tiny-label"]
    assert all((model.object, model.owned_by) == ("model", "instep") and model.created > 0 for model in models)
    assert client.models.retrieve("gpt-image-1").id == "tiny-text"
    with pytest.raises(openai.NotFoundError, match='did you mean "tiny-text"'):
        client.models.retrieve("tiny-txt")


def test_a_model_tells_its_facts(http: httpx.Client) -> None:
    assert generate(http, {"prompt": "a"}).status_code == 200
    model = http.get("/v1/models/tiny-text").json()
    assert (model["family"], model["state"], model["license"]) == ("sd3", "ready", "apache-2.0")
    assert model["samplers"] == ["flow_euler", "flow_heun", "flow_dpmpp_2m", "flow_dpmpp_2m_sd3"]
    grids = ["karras", "exponential", "sgm_uniform"]
    walkers = {"flow_euler": grids, "flow_heun": grids, "flow_dpmpp_2m_sd3": grids}
    assert model["schedules"] == walkers | {"flow_dpmpp_2m": []}
    assert model["defaults"]["num_inference_steps"] == 4
    assert model["limits"]["sizes"] == {"min": 16, "max": 64, "multiple": 16, "square": False}
    assert model["aliases"] == ["gpt-image-1"]
    assert (model["parameters"], model["bytes"], model["gated"]) == (6_543_210, 13_000_000, True)
    assert model["downloaded"] is False
    other = http.get("/v1/models").json()["data"][1]
    assert (other["parameters"], other["bytes"], other["gated"]) == (None, None, False)


def test_a_model_alone_has_the_fields_of_its_bodies(http: httpx.Client) -> None:
    """In the bounds that a body is checked by, and with the defaults that a reply has."""
    model = http.get("/v1/models/tiny-text").json()
    fields = model["fields"]
    assert {"prompt", "num_inference_steps", "loras", "progress", "strength", "resize", "overlay"} <= fields.keys()
    assert not {"class_label", "clip_skip", "user", "quality", "image"} & fields.keys()
    assert all(field["description"] for field in fields.values())
    low, high = fields["num_inference_steps"]["minimum"], fields["num_inference_steps"]["maximum"]
    for steps, status in ((low - 1, 400), (low, 200), (high, 200), (high + 1, 400)):
        assert generate(http, {"prompt": "a", "num_inference_steps": steps}).status_code == status
    reply = generate(http, {"prompt": "a"}).json()
    same = ("num_inference_steps", "guidance_scale", "sampler", "size", "max_sequence_length")
    assert {name: fields[name]["default"] for name in same} == {name: reply[name] for name in same}
    assert fields["strength"]["default"] == model["defaults"]["strength"]
    assert all("fields" not in entry for entry in http.get("/v1/models").json()["data"])


def test_the_fields_of_a_model_of_classes_do_not_list_them(http: httpx.Client) -> None:
    fields = http.get("/v1/models/tiny-label").json()["fields"]
    assert fields["class_label"]["anyOf"][:2] == [{"type": "integer", "minimum": 0, "maximum": 5}, {"type": "string"}]
    assert "goldfish" not in str(fields) and "negative_prompt" not in fields


def test_the_document_says_what_the_facts_of_a_model_are(http: httpx.Client) -> None:
    entry = http.get("/openapi.json").json()["components"]["schemas"]["ModelEntry"]
    facts = {"parameters", "bytes", "gated", "license", "downloaded"}
    assert facts <= set(entry["required"])
    assert all(entry["properties"][name]["description"] for name in facts - {"license"})


def test_classes_by_part_of_a_name(http: httpx.Client) -> None:
    found = http.get("/v1/models/tiny-label/classes", params={"q": "gold"}).json()
    assert found["data"] == [{"id": 1, "name": "goldfish"}, {"id": 5, "name": "golden retriever"}]
    assert len(http.get("/v1/models/tiny-label/classes").json()["data"]) == 6
    assert http.get("/v1/models/tiny-text/classes").json()["data"] == []


@pytest.mark.parametrize("path", ["/v1/models/nope", "/v1/models/nope/classes", "/v1/models/%FF", "/v1/models/..%2Fx"])
def test_an_unknown_model_is_404_in_the_envelope(http: httpx.Client, path: str) -> None:
    reply = http.get(path)
    assert reply.status_code == 404
    assert set(reply.json()["error"]) == {"message", "type", "param", "code"}
