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
