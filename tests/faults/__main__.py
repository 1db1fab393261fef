"""The whole fault table by hand: `make faults`, or `python -m tests.faults` with `--times`, `--only` and `--device`.

A line for each fault: how often it was survived, the most seconds until the front noticed and until all were answered
after that, answers by status or error, requests that were sent again, restarts. The last line is all of it as JSON.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any

from app.bench.machine import facts
from tests.faults.harness import Fault, Room
from tests.faults.table import FAULTS


def measured(fault: Fault, room: Room, times: int) -> dict[str, Any]:
    """Figures of so many runs: the most seconds, and the sums of counts."""
    seconds: dict[str, float] = {}
    counts: Counter[str] = Counter()
    statuses: Counter[str] = Counter()
    for _ in range(times):
        try:
            figures = fault.once(room)
        except Exception:
            traceback.print_exc()
            continue
        counts["survived"] += 1
        statuses.update(figures.get("statuses", {}))
        for name in ("noticed", "answered"):
            seconds[name] = round(max(seconds.get(name, 0.0), figures.get(name, 0.0)), 2)
        counts.update({name: figures.get(name, 0) for name in ("replayed", "restarts")})
    return {"fault": fault.what, "runs": times, "statuses": dict(statuses), **seconds, **counts}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--times", type=int, default=5)
    parser.add_argument("--only", default="", help="faults with these words in their name")
    parser.add_argument("--device", default="cpu", help="of the engine processes: cpu or cuda:N")
    args = parser.parse_args()
    rows = []
    print("| fault | survived | noticed s | answered s | answers | sent again | restarts |\n" + "| --- " * 7 + "|")
    with tempfile.TemporaryDirectory() as folder, Room(Path(folder), args.device) as room:
        for fault in FAULTS:
            if args.only not in fault.what:
                continue
            row = measured(fault, room, args.times)
            rows.append(row)
            answers = ", ".join(f"{count} x {status}" for status, count in row["statuses"].items())
            cells = (f"{row.get('survived', 0)} of {row['runs']}", row.get("noticed", ""), row.get("answered", ""))
            more = (answers, row.get("replayed", ""), row.get("restarts", ""))
            print("|", " | ".join(map(str, (fault.what, *cells, *more))), "|", flush=True)
    print(json.dumps({"machine": facts(room.settings()), "faults": rows}))
    return int(any(row.get("survived", 0) < row["runs"] for row in rows))


if __name__ == "__main__":
    sys.exit(main())
