"""A real service and a real Prometheus that watches it by our own configuration, on loopback ports.

Only the exporter of the GPUs is played: a second target that answers in dcgm-exporter's format.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import httpx
import yaml

from app.settings import Settings
from tests.parts.servers import INSTEP, ROOT, free_port, wait_ready
from tests.parts.tiny import write_models
from tests.parts.waiting import eventually

PROMETHEUS = ROOT / "deploy" / "prometheus"
TOOLS = os.pathsep.join((str(Path(sys.executable).parent), os.environ.get("PATH", "")))
SERVICE_LOG = "service.log"
BROKEN = "broken-dit"
MEMORY = "1050kB"
"""DEVICE_MEMORY of the service: all models in float32 but a part or two, so that there are evictions."""
WAIT = 3.0
"""MAX_WAIT of the service: short, so that a few long requests fill its queue."""


def tool(name: str) -> str | None:
    """prometheus or promtool: beside this Python, where `make setup` puts them, or on PATH."""
    return shutil.which(name, path=TOOLS)


@dataclass
class Stage:
    """service, prometheus: base URLs. pid: of the service's front process. began: Unix seconds."""

    service: str
    prometheus: str
    gpus: str
    pid: int
    began: float

    def get(self, path: str, **params: object) -> Any:
        """One call of Prometheus' API. Asserts that it succeeds."""
        reply = httpx.get(f"{self.prometheus}/api/v1/{path}", params={k: str(v) for k, v in params.items()}, timeout=30)
        assert reply.status_code == 200, reply.text
        return reply.json()["data"]

    def series(self, query: str, step: float = 1.0) -> list[dict[str, Any]]:
        """Series of this query since the start that have a finite value: `metric`, and `values` of (time, text)."""
        found = self.get("query_range", query=query, start=self.began, end=time.time(), step=step)["result"]
        return [one for one in found if any(math.isfinite(float(value)) for _, value in one["values"])]

    def expand(self, query: str, within: str = "1m") -> str:
        """A dashboard's query with its variables filled in."""
        query = query.replace("$instance", re.escape(self.service.removeprefix("http://")).replace("\\", "\\\\"))
        return query.replace("$model", ".*").replace("$__rate_interval", within)


@contextmanager
def staged(folder: Path, interval: str = "1s") -> Iterator[Stage]:
    """The service, Prometheus and the played exporter, all up."""
    with ExitStack() as stack:
        service, pid = stack.enter_context(_service(folder))
        gpus = stack.enter_context(_exporter())
        prometheus = stack.enter_context(_prometheus(folder, service, gpus, interval))
        wait_ready(service)
        stage = Stage(service, prometheus, gpus, pid, time.time())
        eventually(lambda: len(stage.series("up == 1")) >= 2, 30, lambda: json.dumps(stage.get("targets")), pause=0.1)
        yield stage


def write_broken(models: Path) -> None:
    """A card whose network ends in the middle of a tensor."""
    shutil.copytree(models / "tiny-dit", models / BROKEN)
    card = models / BROKEN / "card.toml"
    card.write_text(card.read_text(encoding="utf-8").replace('"tiny-dit"', f'"{BROKEN}"'), encoding="utf-8")
    (weights,) = (models / BROKEN / "transformer").glob("*.safetensors")
    os.truncate(weights, weights.stat().st_size // 2)


@contextmanager
def _running(words: list[str], log: Path, env: dict[str, str] | None = None) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose output goes to a file; it is ended, by SIGTERM first."""
    with log.open("wb") as output:
        process = subprocess.Popen(words, stdout=output, stderr=subprocess.STDOUT, cwd=ROOT, env=env)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


@contextmanager
def _service(folder: Path) -> Iterator[tuple[str, int]]:
    write_models(folder / "models")
    write_broken(folder / "models")
    url = f"http://127.0.0.1:{free_port()}"
    settings = {
        "port": url.rpartition(":")[2], "models": folder / "models", "devices": "cpu", "cache": folder / "cache",
        "device_memory": MEMORY, "dtype": "float32", "max_wait": WAIT, "drain": 2, "log_level": "warning",
    }  # fmt: skip
    flags = [word for name, value in settings.items() for word in (f"--{name.replace('_', '-')}", str(value))]
    unset = {name: value for name, value in os.environ.items() if not name.startswith("INSTEP_")}
    assert set(settings) <= set(Settings.model_fields)
    with _running([*INSTEP, "serve", *flags], folder / SERVICE_LOG, unset) as process:
        yield url, process.pid


@contextmanager
def _prometheus(folder: Path, service: str, gpus: str, interval: str) -> Iterator[str]:
    """Prometheus by our prometheus.yml and rules; only where the targets are and how often it looks are other."""
    config = yaml.safe_load((PROMETHEUS / "prometheus.yml").read_text(encoding="utf-8"))
    config["global"] |= {"scrape_interval": interval, "scrape_timeout": interval, "evaluation_interval": interval}
    config["rule_files"] = [str(PROMETHEUS / pattern) for pattern in config["rule_files"]]
    targets = {"instep": service, "gpu": gpus}
    config["scrape_configs"] = [job for job in config["scrape_configs"] if job["job_name"] in targets]
    assert len(config["scrape_configs"]) == len(targets)
    for job in config["scrape_configs"]:
        del job["dns_sd_configs"]
        job["static_configs"] = [{"targets": [targets[job["job_name"]].removeprefix("http://")]}]
    file, log = folder / "prometheus.yml", folder / "prometheus.log"
    file.write_text(yaml.safe_dump(config), encoding="utf-8")
    url = f"http://127.0.0.1:{free_port()}"
    words = [str(tool("prometheus")), f"--config.file={file}", f"--storage.tsdb.path={folder / 'data'}"]
    with _running([*words, f"--web.listen-address={url.removeprefix('http://')}"], log):
        eventually(lambda: httpx.get(f"{url}/-/ready").status_code == 200, 60, log.read_text, despite=httpx.HTTPError)
        yield url


def gpu_fields() -> list[str]:
    """The fields that compose's dcgm-exporter exports."""
    lines = (PROMETHEUS / "gpu.csv").read_text(encoding="utf-8").splitlines()
    return [line.split(",")[0] for line in lines if not line.startswith("#")]


def exported(seconds: float) -> str:
    """What dcgm-exporter would say of one GPU whose figures go up and down, in its own format and units."""
    share = 0.5 + 0.4 * math.sin(seconds / 20)
    values = {
        "DCGM_FI_DEV_GPU_UTIL": round(100 * share),
        "DCGM_FI_DEV_FB_USED": round(81_920 * share),
        "DCGM_FI_DEV_FB_FREE": 81_920 - round(81_920 * share),
        "DCGM_FI_DEV_GPU_TEMP": round(80 * share),
        "DCGM_FI_DEV_POWER_USAGE": 700 * share,
    }
    labels = 'gpu="0",UUID="GPU-c2f76b33",pci_bus_id="00000000:31:00.0",device="nvidia0",modelName="NVIDIA H100"'
    return "".join(f"# TYPE {name} gauge\n{name}{{{labels}}} {values[name]:g}\n" for name in gpu_fields())


@contextmanager
def _exporter() -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            with suppress(ConnectionError):
                self.send_response(200)
                self.send_header("Content-Type", "text/plain; version=0.0.4")
                self.end_headers()
                self.wfile.write(exported(time.time()).encode())

        def log_message(self, format: str, *args: object) -> None:
            """Nothing."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
