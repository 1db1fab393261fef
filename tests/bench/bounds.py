"""Every bound of tests/parts/close.py beside the worst that is seen, on this machine made to compute as others do.

`python -m tests.bench.bounds [TEST ...]` runs the tests that compare floats once for each of the settings below, in
turn, and prints a line for each bound of each file. It fails when a test fails, when a bound has less than ten times
headroom, or when a file has a bound that none of its controls is ten times above. Without TEST it takes every file
that uses tests/parts/close.py, which is long: the first setting runs whole files, the others only what compared there.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from itertools import product
from pathlib import Path

from tests.parts.close import HEADROOM

ROOT = Path(__file__).parent.parent.parent
PROCESSORS: dict[str, dict[str, str]] = {
    "native": {},
    "ATEN_CPU_CAPABILITY=default": {"ATEN_CPU_CAPABILITY": "default"},
    "ONEDNN_MAX_CPU_ISA=AVX2": {"ONEDNN_MAX_CPU_ISA": "AVX2"},
    "both, MKL and numpy": {
        "ATEN_CPU_CAPABILITY": "default",
        "ONEDNN_MAX_CPU_ISA": "AVX2",
        "MKL_CBWR": "COMPATIBLE",
        "NPY_DISABLE_CPU_FEATURES": "X86_V4,AVX512_ICL",
    },
}
"""Environments by name; the last makes all four libraries add in another order than here."""
THREADS = (2, 1)


@dataclass(frozen=True)
class Seen:
    """One comparison: the kind is "close" or "apart", the setting a processor and its threads."""

    test: str
    kind: str
    bound: float
    seen: float
    setting: str

    @property
    def file(self) -> str:
        return self.test.split("::")[0]

    @property
    def headroom(self) -> float:
        """How many times what is seen is within the bound; NaN counts as none."""
        return self.bound / self.seen if self.seen > 0 else float("inf") if self.seen == 0 else 0.0


def files() -> list[str]:
    """The test files that use tests/parts/close.py, less those that need a GPU."""
    paths = sorted(path.relative_to(ROOT) for path in (ROOT / "tests").rglob("test_*.py"))
    return [str(path) for path in paths if "gpu" not in path.parts and "tests.parts.close" in (ROOT / path).read_text()]


def run(tests: list[str], setting: str, environment: dict[str, str]) -> tuple[list[Seen], bool]:
    """What the comparisons of these tests saw, and whether all tests passed."""
    with tempfile.TemporaryDirectory() as folder:
        lines = Path(folder, "seen")
        lines.touch()
        command = [sys.executable, "-m", "pytest", "-q", "-m", "not gpu", "--timeout=1200", *tests]
        done = subprocess.run(command, cwd=ROOT, env=os.environ | environment | {"BOUNDS": str(lines)}, text=True,
                              stdout=subprocess.PIPE)  # fmt: skip
        if done.returncode:
            print(done.stdout[-4000:], file=sys.stderr)
        found = [json.loads(line) for line in lines.read_text(encoding="utf-8").splitlines()]
    return [Seen(**one, setting=setting) for one in found], done.returncode == 0


def compared(found: list[Seen]) -> list[str]:
    """The tests in which something was compared, without their parameters."""
    return sorted({one.test.split("[")[0] for one in found})


def table(found: list[Seen]) -> tuple[list[str], bool]:
    """A line for each bound of each file, and whether all have headroom and a control."""
    lines, good = (
        ["| file | bound | worst seen | headroom | in | least control |", "| --- | --- | --- | --- | --- | --- |"],
        True,
    )
    for file, bound in sorted({(one.file, one.bound) for one in found if one.kind == "close"}):
        own = [one for one in found if one.file == file]
        worst = min((one for one in own if (one.kind, one.bound) == ("close", bound)), key=lambda one: one.headroom)
        control = min((one.seen for one in own if one.kind == "apart" and one.bound >= bound), default=0.0)
        fine = worst.headroom >= HEADROOM and control >= HEADROOM * bound
        good = good and fine
        cells = (file, f"{bound:g}", f"{worst.seen:.1e}", f"{worst.headroom:.0f}", worst.setting, f"{control:.1e}")
        lines.append(f"| {' | '.join(cells)} |{'' if fine else ' <- too little'}")
    return lines, good


def main(tests: list[str]) -> bool:
    """Run all settings and print the table. Returns whether every bound and every test is good."""
    found: list[Seen] = []
    passed = True
    for (name, environment), threads in product(PROCESSORS.items(), THREADS):
        setting = f"{name}, {threads} threads" if threads > 1 else f"{name}, 1 thread"
        more, fine = run(tests, setting, environment | {"OMP_NUM_THREADS": str(threads)})
        print(f"{setting}: {len(more)} comparisons{'' if fine else ', and tests failed'}", file=sys.stderr, flush=True)
        found, passed, tests = found + more, passed and fine, compared(found + more)
    lines, good = table(found)
    print("\n".join(lines))
    return good and passed


if __name__ == "__main__":
    raise SystemExit(not main(sys.argv[1:] or files()))
