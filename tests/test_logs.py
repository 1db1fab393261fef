"""Every line is one JSON object, whichever logger wrote it."""

from __future__ import annotations

import json
import subprocess
import sys

CODE = """
import logging
from app import logs
logs.setup("info")
logs.logger("a").info("request", status=200, path="/\\n")
logs.logger("a").debug("hidden")
logging.getLogger("b").warning("%d left", 3)
try:
    1 / 0
except ZeroDivisionError:
    logging.getLogger("c").exception("broke")
"""


def test_one_json_object_a_line() -> None:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, timeout=60, check=True)
    ours, theirs, broken = (json.loads(line) for line in done.stderr.splitlines())
    assert (ours["event"], ours["level"], ours["logger"], ours["status"]) == ("request", "info", "a", 200)
    assert (theirs["event"], theirs["level"], theirs["logger"]) == ("3 left", "warning", "b")
    assert "ZeroDivisionError" in broken["exception"]
    assert all(line["timestamp"].endswith("Z") for line in (ours, theirs, broken))
