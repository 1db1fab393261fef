"""The image and the services: Dockerfile and docker-compose.yml do what they promise, as far as Docker is not needed.

`make check` lints the Dockerfile. deploy/README.md says on what it was built and run.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tomllib
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest
import yaml
from packaging.specifiers import SpecifierSet
from typer.testing import CliRunner

from app.cli.commands import app
from app.main import LAST_ANSWERS, create_app
from app.settings import Settings

ROOT = Path(__file__).parent.parent
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text(encoding="utf-8"))
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]
SERVERS = ("instep", "instep-gpu")
VARIABLES = {f"INSTEP_{name.upper()}" for name in Settings.model_fields}
SECRET = re.compile("TOKEN|KEY|SECRET|PASSWORD", re.IGNORECASE)


def instructions() -> list[tuple[str, str]]:
    """(instruction, the rest of its line) of the Dockerfile, continued lines joined, comments left out."""
    lines = (ROOT / "Dockerfile").read_text(encoding="utf-8").splitlines()
    text = re.sub(r"\\\n\s*", " ", "\n".join(line for line in lines if not line.lstrip().startswith("#")))
    return [(name, rest.strip()) for name, _, rest in (line.partition(" ") for line in text.splitlines() if line)]


def stages() -> list[list[tuple[str, str]]]:
    """The instructions of each stage; what stands before the first is left out."""
    found: list[list[tuple[str, str]]] = []
    for name, rest in instructions():
        if name == "FROM":
            found.append([])
        if found:
            found[-1].append((name, rest))
    return found


def only(name: str) -> str:
    (rest,) = [rest for one, rest in stages()[-1] if one == name]
    return rest


def environment(rest: str) -> dict[str, str]:
    return dict(word.split("=", 1) for word in rest.split())


def ignored() -> list[str]:
    return (ROOT / ".dockerignore").read_text(encoding="utf-8").split()


def test_the_image_runs_the_server_itself_as_nobody_in_particular() -> None:
    words = json.loads(only("CMD"))
    assert words[0] in tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["scripts"]
    assert CliRunner().invoke(app, [*words[1:], "--help"]).exit_code == 0
    assert int(only("USER")) >= 10_000 and f"--uid {only('USER')} " in only("RUN")
    assert only("STOPSIGNAL") == "SIGTERM"
    assert [name for name, _ in stages()[-1]].index("USER") > max(
        place for place, (name, _) in enumerate(stages()[-1]) if name in ("RUN", "COPY")
    )


def test_the_base_is_a_python_that_the_project_takes() -> None:
    version = dict(word.split("=") for name, word in instructions() if name == "ARG" and "PYTHON" in word)["PYTHON"]
    assert {rest.split()[0] for name, rest in instructions() if name == "FROM"} == {"python:${PYTHON}-slim"}
    needs = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["requires-python"]
    assert SpecifierSet(needs).contains(version)


def test_the_context_is_what_is_copied_and_no_more() -> None:
    copied = [rest.split()[:-1] for name, rest in instructions() if name == "COPY" and not rest.startswith("--from")]
    sources = {source for words in copied for source in words}
    assert ignored()[0] == "*" and {line[1:] for line in ignored() if line.startswith("!")} == sources
    assert [source for source in sources if not (ROOT / source).exists()] == []
    assert [rest for name, rest in stages()[-1] if name == "COPY" and "--from=build" in rest] == [
        "--from=build /venv /venv"
    ]


def test_the_page_is_in_the_image() -> None:
    """The folder app/ is copied whole, and its wheel has the page (tests/api/test_page.py)."""
    assert ("COPY", "app app") in instructions()
    assert [
        line for line in ignored() if line[0] != "!" and line not in ("*", "**/__pycache__", "models/recipes")
    ] == []


def test_no_secret_is_asked_for_or_set_in_the_image() -> None:
    named = [rest for name, rest in instructions() if name in ("ARG", "ENV", "LABEL")]
    assert [rest for rest in named if SECRET.search(rest)] == []
    assert "HF_HUB_OFFLINE=1" in only("ENV")


def test_variables_are_settings() -> None:
    given = [environment(rest) for name, rest in instructions() if name == "ENV"]
    given += [service.get("environment", {}) for service in SERVICES.values()]
    names = {name for one in given for name in one if name.startswith("INSTEP_")}
    assert len(names) > 10 and names - VARIABLES == set()
    Settings(**{name.removeprefix("INSTEP_").lower(): value for name, value in image_settings().items()})


def image_settings() -> dict[str, str]:
    return {name: value for name, value in environment(only("ENV")).items() if name.startswith("INSTEP_")}


@pytest.mark.parametrize(
    ("status", "port", "code"),
    [(200, "{port}", 0), (503, "{port}", 1), (200, "", 0), (200, "tcp://10.96.12.7:8000", 0), (200, None, 0)],
)
def test_the_health_check_is_what_readyz_says(status: int, port: str | None, code: int) -> None:
    """The command of the image, run against a server that answers so, at the port that the server takes then."""
    asked: list[str] = []

    class Probe(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()

        def log_message(self, format: str, *words: Any) -> None:
            """Nothing."""

    server = HTTPServer(("127.0.0.1", 0), Probe)
    Thread(target=server.handle_request, daemon=True).start()
    words = json.loads(only("HEALTHCHECK").partition("CMD ")[2])
    actual, default = str(server.server_address[1]), str(Settings.model_fields["port"].default)
    given = {} if port is None else {"INSTEP_PORT": port.format(port=actual)}
    done = subprocess.run(
        [sys.executable, *(word.replace(default, actual) for word in words[1:])],
        env={**given, "http_proxy": "http://127.0.0.1:9"},
        capture_output=True,
        timeout=30,
    )
    server.server_close()
    assert (words[0], done.returncode, asked) == ("python", code, ["/readyz"])
    assert asked[0] in create_app(Settings(models=ROOT / "models")).openapi()["paths"]


def test_the_services_are_valid_compose() -> None:
    """The schema of the Compose specification, as check-jsonschema brings it."""
    words = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", "vendor.compose-spec", "docker-compose.yml"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stdout


def test_the_drain_ends_before_docker_kills() -> None:
    for name in SERVERS:
        grace = float(SERVICES[name]["stop_grace_period"].removesuffix("s"))
        drain = float(SERVICES[name]["environment"]["INSTEP_DRAIN"])
        assert grace > drain + LAST_ANSWERS, name


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_may_do_little(name: str) -> None:
    service = SERVICES[name]
    assert service["read_only"] is True and service["tmpfs"] == ["/tmp"] and service["init"] is True
    assert service["cap_drop"] == ["ALL"] and service["security_opt"] == ["no-new-privileges:true"]
    assert {"privileged", "cap_add", "user", "pid", "network_mode"} & set(service) == set()
    assert set(service["logging"]["options"]) == {"max-size", "max-file"}
    assert [port for port in service.get("ports", []) if not port.startswith("127.0.0.1:")] == []
    assert re.search(r":(v?\d+\.\d+\.\d+(-[\d.]+-ubuntu[\d.]+)?|cpu|cuda)$", service["image"])


@pytest.mark.parametrize("name", SERVICES)
def test_what_is_mounted_is_there(name: str) -> None:
    for source, _, rest in (mount.partition(":") for mount in SERVICES[name].get("volumes", [])):
        if source.startswith("./"):
            assert (ROOT / source).exists() and rest.endswith(":ro"), source
        else:
            assert source in COMPOSE["volumes"]


def test_what_dashboards_and_rules_refer_to_is_mounted() -> None:
    targets = {name: [mount.split(":")[1] for mount in one.get("volumes", [])] for name, one in SERVICES.items()}
    scrape = yaml.safe_load((ROOT / "deploy/prometheus/prometheus.yml").read_text(encoding="utf-8"))
    (found,) = [job for job in scrape["scrape_configs"] if job["job_name"] == "instep"]
    (dns,) = found["dns_sd_configs"]
    (gpus,) = [job["dns_sd_configs"][0] for job in scrape["scrape_configs"] if job["job_name"] == "gpu"]
    assert (gpus["names"], gpus["port"]) == (["dcgm-exporter"], 9400)
    assert SERVICES["dcgm-exporter"]["entrypoint"][1].removeprefix("--collectors=") in targets["dcgm-exporter"]
    assert (set(dns["names"]), str(dns["port"])) == (set(SERVERS), image_settings()["INSTEP_PORT"])
    assert {f"/etc/prometheus/{Path(rules).parent}" for rules in scrape["rule_files"]} <= set(targets["prometheus"])
    assert "--config.file=/etc/prometheus/prometheus.yml" in SERVICES["prometheus"]["command"]
    folder = ROOT / "deploy/grafana/provisioning"
    (source,) = yaml.safe_load((folder / "datasources/prometheus.yml").read_text(encoding="utf-8"))["datasources"]
    assert source["url"] == "http://prometheus:9090"
    (boards,) = yaml.safe_load((folder / "dashboards/instep.yml").read_text(encoding="utf-8"))["providers"]
    assert boards["options"]["path"] in targets["grafana"]


def test_one_profile_starts_each_server_and_the_file_of_defaults_names_one() -> None:
    assert {name: SERVICES[name].get("profiles") for name in SERVICES} == {
        **{"instep": ["cpu"], "instep-gpu": ["gpu"], "pull": ["pull"]},
        **{"dcgm-exporter": ["gpu"], "prometheus": None, "grafana": None},
    }
    lines = (ROOT / ".env").read_text(encoding="utf-8").splitlines()
    assert [line for line in lines if not line.startswith("#")] == ["COMPOSE_PROFILES=cpu"]


def test_only_the_gpu_services_reserve_gpus() -> None:
    reserved = {name for name, service in SERVICES.items() if "deploy" in service}
    assert reserved == {"instep-gpu", "dcgm-exporter"}
    for name in reserved:
        (device,) = SERVICES[name]["deploy"]["resources"]["reservations"]["devices"]
        assert device == {"driver": "nvidia", "count": "all", "capabilities": ["gpu"]}
    assert {name: SERVICES[name]["build"]["args"]["TORCH"] for name in SERVERS} == {
        "instep": "cpu",
        "instep-gpu": "cuda",
    }


def test_keys_and_tokens_come_from_outside_and_reach_one_service() -> None:
    for service in SERVICES.values():
        for name, value in service.get("environment", {}).items():
            if SECRET.search(name):
                assert value in (None, "${INSTEP_API_KEYS_FILE:+/run/secrets/api_keys}"), name
    assert [name for name, one in SERVICES.items() if "HF_TOKEN" in one.get("environment", {})] == ["pull"]
    assert COMPOSE["secrets"] == {"api_keys": {"file": "${INSTEP_API_KEYS_FILE:-/dev/null}"}}
    assert [name for name, one in SERVICES.items() if "secrets" in one] == list(SERVERS)
    words = SERVICES["pull"]["entrypoint"]
    assert words[0] == json.loads(only("CMD"))[0]
    assert CliRunner().invoke(app, [*words[1:], "--help"]).exit_code == 0
    names = SERVICES["instep"]["environment"].keys() & {"INSTEP_PRELOAD", "INSTEP_DEFAULT_MODEL", "INSTEP_ALIAS"}
    assert len(names) == 3 and names <= SERVICES["pull"]["environment"].keys()  # what it pulls without ids
    assert SERVICES["pull"]["environment"]["HF_HUB_OFFLINE"] == "0" and SERVICES["pull"]["restart"] == "no"


def test_what_the_guide_names_is_so() -> None:
    """deploy/README.md: its settings, files and ports."""
    text = (ROOT / "deploy" / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"INSTEP_[A-Z_]+", text)) <= VARIABLES
    links = [target.partition("#")[0] for target in re.findall(r"\]\((?!http)([^)]+)\)", text)]
    assert links and [link for link in links if not (ROOT / "deploy" / link).exists()] == []
    assert {port for port in re.findall(r"http://127\.0\.0\.1:(\d+)", text)} == {
        port.split(":")[1] for service in SERVICES.values() for port in service.get("ports", [])
    }
