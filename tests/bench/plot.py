"""Latency by class from a line of `tests.bench.compare serve`, as a picture: `python -m tests.bench.plot FILE OUT.svg`.

FILE may be all that the command printed. One panel for the median and one for p95; grey that is read on light and dark.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
from matplotlib import pyplot

INK = "#808890"
COLOURS = ("#2f81f7", "#d29922", "#8b949e", "#bf5af2", "#3fb950", "#f85149")
KINDS = ("short", "medium", "long", "all")


def plot(found: dict[str, Any], out: Path) -> None:
    """Bars on a logarithmic scale: classes side by side, a bar for each policy."""
    policies = list(found["policies"])
    kinds = [kind for kind in KINDS if kind in found["policies"][policies[0]]["latency"]]
    colours = {"text.color": INK, "axes.labelcolor": INK, "xtick.color": INK, "ytick.color": INK, "axes.edgecolor": INK}
    with pyplot.rc_context({**colours, "font.size": 10, "svg.hashsalt": "instep"}):
        figure, panels = pyplot.subplots(1, 2, figsize=(9, 3.6), sharey=True, layout="constrained")
        for panel, what in zip(panels, ("p50", "p95"), strict=True):
            width = 0.8 / len(policies)
            for place, name in enumerate(policies):
                heights = [found["policies"][name]["latency"][kind][what] for kind in kinds]
                at = [index + (place - (len(policies) - 1) / 2) * width for index in range(len(kinds))]
                bars = panel.bar(at, heights, width * 0.92, color=COLOURS[place % len(COLOURS)], label=name)
                panel.bar_label(bars, fmt="%.2g", fontsize=8, padding=2)
            panel.set(title=f"{what}, seconds", yscale="log", xticks=range(len(kinds)), xticklabels=kinds)
            panel.set_facecolor("none")
            panel.spines[["top", "right"]].set_visible(False)
        panels[0].legend(frameon=False, labelcolor=INK)
        load = f"{found['load']:g} of {found['baseline']}'s capacity ({found['rate']:.2f} requests/s)"
        figure.suptitle(f"{found['model']} at {load}", fontsize=11)
        figure.savefig(out, transparent=True, dpi=160)
        pyplot.close(figure)


def main() -> None:
    lines = Path(sys.argv[1]).read_text(encoding="utf-8").splitlines()
    plot(json.loads(next(line for line in reversed(lines) if line.startswith("{"))), Path(sys.argv[2]))


if __name__ == "__main__":
    main()
