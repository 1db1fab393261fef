"""What the load of a checkpoint of 1 GB takes of memory above the model: `python -m tests.bench.loading`.

The bar is 1.1 times the largest shard. Ends in one JSON line.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from tests.parts.measured import WAYS, write_network


def run(network: Path, way: str) -> dict[str, int]:
    """In a process of its own: what another load has left would hide some of it."""
    command = [sys.executable, "-m", "tests.parts.measured", str(network), way]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    loads: dict[str, dict[str, int]] = json.loads(done.stdout.splitlines()[-1])
    return loads[way]


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        network = Path(folder) / "network"
        write_network(network, blocks=6, shards=5)
        loads = {way: run(network, way) for way in WAYS}
    for name, load in loads.items():
        print(f"{name:16} model {load['model'] / 1e6:7.0f} MB, above it {load['above'] / load['shard']:.2f} shards")
    shares = {name: round(load["above"] / load["shard"], 3) for name, load in loads.items()}
    told = {
        "bench": "loading",
        "date": date.today().isoformat(),
        "shard": loads["held"]["shard"],
        "above in shards": shares,
    }
    print(json.dumps(told))


if __name__ == "__main__":
    main()
