"""SIGHUP: a reload, but the end where the terminal of the server is gone."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
from pathlib import Path

import httpx
import pytest

from app.settings import Settings
from tests.parts.cards import write_cards
from tests.parts.servers import INSTEP, Served, free_port, wait_ready

pytestmark = pytest.mark.slow


def settings_in(folder: Path) -> Settings:
    return Settings(models=write_cards(folder / "models"), devices="cpu", port=0, drain=5)


def test_a_server_survives_many_of_them(tmp_path: Path) -> None:
    with Served(settings_in(tmp_path)) as served:
        served.wait_ready()
        for _ in range(20):
            served.process.send_signal(signal.SIGHUP)
        served.logged("reloaded")
        assert httpx.get(f"{served.url}/healthz").status_code == 200
        served.stop()
        assert "Traceback" not in served.words


def test_it_ends_where_its_terminal_is_gone(tmp_path: Path) -> None:
    """It would end without the handler too: nobody could stop a server that has lost its terminal."""
    ours, theirs = pty.openpty()
    port = free_port()
    words = ("serve", "--models", str(write_cards(tmp_path / "models")), "--devices", "cpu", "--port", str(port))
    process = subprocess.Popen((*INSTEP, *words), stdin=subprocess.DEVNULL, stdout=theirs, stderr=theirs)
    try:
        os.close(theirs)
        wait_ready(f"http://127.0.0.1:{port}", alive=lambda: process.poll() is None)
        process.send_signal(signal.SIGHUP)
        while b"reloaded" not in os.read(ours, 65536):
            assert process.poll() is None
        os.close(ours)
        process.send_signal(signal.SIGHUP)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait()
