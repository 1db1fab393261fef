"""Memory: a load peaks at most 1.1 times its largest shard above the model (python -m tests.bench.loading: 1 GB)."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from tests.parts.measured import write_network

ROOT = Path(__file__).parent.parent.parent


@pytest.mark.slow
def test_a_load_holds_one_shard_at_a_time(tmp_path: Path) -> None:
    write_network(tmp_path / "network", blocks=2, shards=4)
    command = [sys.executable, "-m", "tests.parts.measured", str(tmp_path / "network"), "bfloat16", "held"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=True)
    loads = json.loads(done.stdout.splitlines()[-1])
    streamed, held = loads["bfloat16"], loads["held"]
    assert streamed["model"] > 250e6 and 3 * streamed["shard"] < streamed["model"], "several shards"
    assert streamed["above"] <= 1.1 * streamed["shard"], streamed
    assert held["above"] > 2 * held["shard"], "the measure sees shards that are held"
