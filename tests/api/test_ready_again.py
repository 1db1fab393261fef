"""Readiness after an engine process has died: not before it is back with the models of PRELOAD."""

from __future__ import annotations

import os
import signal

import httpx
import pytest

from app.settings import Settings
from tests.parts.servers import Server
from tests.parts.waiting import eventually


@pytest.mark.slow
def test_a_server_whose_engine_died_is_not_ready_before_its_models_are_back(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("INSTEP_FAKE_LOAD", "2")
    with Server(settings.model_copy(update={"preload": "tiny-text"})) as server:
        url, supervisor = server.url, server.supervisor

        def ready() -> int:
            return httpx.get(f"{url}/readyz").status_code

        assert ready() == 503, "its model has not been loaded yet"
        eventually(lambda: ready() == 200)
        (first,) = supervisor.pids
        os.kill(first, signal.SIGKILL)
        eventually(lambda: not supervisor.live)
        assert ready() == 503
        eventually(lambda: supervisor.live)
        assert supervisor.pids != [first] and supervisor.states["tiny-text"].state != "ready"
        assert ready() == 503, "there is an engine, and it loads still"
        assert httpx.get(f"{url}/healthz").status_code == 200
        eventually(lambda: ready() == 200)
        assert supervisor.states["tiny-text"].state == "ready"


@pytest.mark.slow
def test_a_server_without_preload_is_not_ready_while_it_has_no_engine(settings: Settings) -> None:
    with Server(settings.model_copy(update={"preload": ""})) as server:
        url, supervisor = server.url, server.supervisor
        assert httpx.get(f"{url}/readyz").status_code == 200
        os.kill(supervisor.pids[0], signal.SIGKILL)
        eventually(lambda: not supervisor.live)
        assert httpx.get(f"{url}/readyz").status_code == 503
        eventually(lambda: httpx.get(f"{url}/readyz").status_code == 200)
