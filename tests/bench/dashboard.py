"""The dashboard's own queries, asked of a real Prometheus and plotted: `python -m tests.bench.dashboard [SECONDS]`.

Writes deploy/grafana/dashboard.png. It is a plot of what Grafana would ask, in its places.
"""

from __future__ import annotations

import io
import json
import math
import os
import re
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from PIL import Image

matplotlib.use("Agg")
from matplotlib import pyplot
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, MaxNLocator, MultipleLocator

from deploy.grafana import make
from tests.deploy.stage import Stage, staged
from tests.deploy.traffic import Traffic

FILE = make.FILE.parent.parent / "dashboard.png"
STEP, WITHIN = 2.0, "15s"
UNIT = 0.27
"""Inches of one of Grafana's 24 columns and rows, in height; a column is 2.4 times as wide."""
CAPTION = (
    "A plot of the queries of deploy/grafana/dashboards/instep.json, each in its place: not Grafana. Asked of a real "
    "Prometheus that watched a service\nwith tiny models on two CPU cores. What dcgm-exporter says is played."
)
COLOURS = {"green": "#3f8f4f", "yellow": "#c99a00", "red": "#c4162a", "blue": "#3274d9"}

Series = list[tuple[str, np.ndarray]]


def main() -> None:
    seconds = float(sys.argv[1]) if len(sys.argv) > 1 else 180.0
    with tempfile.TemporaryDirectory() as folder, staged(Path(folder)) as stage:
        death = threading.Timer(seconds * 0.6, kill_engine, [stage.pid])
        death.start()
        Traffic(stage.service).run(seconds)
        time.sleep(5)
        draw(stage)
    print(f"wrote {FILE}, {FILE.stat().st_size // 1000} kB")


def kill_engine(front: int) -> None:
    """The service's engine process dies of a sudden, so that a restart is seen."""
    (child,) = Path(f"/proc/{front}/task/{front}/children").read_text(encoding="ascii").split()
    os.kill(int(child), signal.SIGKILL)


def draw(stage: Stage) -> None:
    panels = json.loads(make.FILE.read_text(encoding="utf-8"))["panels"]
    times = np.arange(stage.began, time.time(), STEP)
    height = max(panel["gridPos"]["y"] + panel["gridPos"]["h"] for panel in panels) + 2
    figure = pyplot.figure(figsize=(24 * UNIT * 2.4, height * UNIT), dpi=100)
    figure.text(0.012, 1 - 0.3 / height, CAPTION, va="top", fontsize=9, color="#555555")
    for panel in panels:
        place = panel["gridPos"]
        top = 1 - (place["y"] + 2) / height
        if panel["type"] == "row":
            figure.text(0.012, top - 0.8 / height, panel["title"], fontsize=13, weight="bold")
            continue
        left, bottom = 0.045 + 0.95 * place["x"] / 24, top - (place["h"] - 2.2) / height
        size = 0.95 * place["w"] / 24 - 0.045, (place["h"] - 3.4) / height
        axes = figure.add_axes((left, bottom, *size))
        axes.set_title(panel["title"], fontsize=9, loc="left")
        {"stat": stat, "timeseries": lines, "heatmap": heat}[panel["type"]](
            axes, panel, ask(stage, panel, times), times
        )
    picture = io.BytesIO()
    figure.savefig(picture, format="png")
    Image.open(picture).convert("RGB").quantize(96, dither=Image.Dither.NONE).save(FILE, optimize=True)


def ask(stage: Stage, panel: dict[str, Any], times: np.ndarray) -> Series:
    """All series of a panel by their legends, NaN where there is nothing. Asserts that there is one."""
    found: Series = []
    for target in panel["targets"]:
        query = stage.expand(target["expr"], WITHIN)
        for one in stage.get("query_range", query=query, start=times[0], end=times[-1], step=STEP)["result"]:
            values = np.full(len(times), np.nan)
            for when, value in one["values"]:
                values[min(len(times) - 1, round((when - times[0]) / STEP))] = float(value)
            found.append((legend(target["legendFormat"], one["metric"]), values))
    assert found, panel["title"]
    return sorted(found, key=lambda one: float(one[0]) if panel["type"] == "heatmap" else 0)


def legend(text: str, labels: dict[str, str]) -> str:
    labels = {**labels, "instance": ""}
    return re.sub(r"\{\{(\w+)\}\}", lambda found: labels.get(found[1], ""), text).strip() or "this replica"


def stat(axes: Axes, panel: dict[str, Any], series: Series, times: np.ndarray) -> None:
    values = series[0][1]
    value = float(values[np.isfinite(values)][-1])
    defaults = panel["fieldConfig"]["defaults"]
    words = {key: one["text"] for mapping in defaults["mappings"] for key, one in mapping["options"].items()}
    steps = [
        step["color"] for step in defaults["thresholds"]["steps"] if step["value"] is None or value >= step["value"]
    ]
    axes.set_axis_off()
    text = words.get(f"{value:.0f}") or told(value, defaults["unit"])
    axes.text(0, 0.35, text, fontsize=20, color=COLOURS[steps[-1]], va="center", transform=axes.transAxes)


def lines(axes: Axes, panel: dict[str, Any], series: Series, times: np.ndarray) -> None:
    defaults = panel["fieldConfig"]["defaults"]
    minutes = (times - times[0]) / 60
    if defaults["custom"]["stacking"]["mode"] == "normal":
        layers = axes.stackplot(minutes, [np.nan_to_num(values) for _, values in series], alpha=0.75)
        for layer, (name, _) in zip(layers, series, strict=True):
            layer.set_label(name)
    else:
        for name, values in series:
            axes.plot(minutes, values, linewidth=1.2, label=name)
    axes.set_ylim(0, defaults.get("max"))
    for step in defaults["thresholds"]["steps"][1:]:
        if step["value"] <= axes.get_ylim()[1]:
            axes.axhline(step["value"], color=COLOURS[step["color"]], linestyle="--", linewidth=0.8)
    finish(axes, defaults["unit"])
    below(axes, [name for name, values in series if np.nan_to_num(values).any()] or [name for name, _ in series])


def below(axes: Axes, names: Sequence[str], most: int = 10) -> None:
    """The legend under the axes: what is not zero all the time, as much of it as there is room for."""
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    shown = [handles[name] for name in names[:most]]
    words = [*names[: most - 1], f"{names[most - 1]}, ..."] if len(names) > most else names
    columns = max(1, min(len(words), 110 // (max(map(len, words)) + 5)))
    axes.legend(shown, words, fontsize=6.3, ncols=columns, loc="upper left", bbox_to_anchor=(-0.04, -0.13),
                frameon=False, borderpad=0, handlelength=1, columnspacing=0.8, handletextpad=0.4)  # fmt: skip


def heat(axes: Axes, panel: dict[str, Any], series: Series, times: np.ndarray) -> None:
    """NOTE: buckets are cumulative; Grafana takes the differences itself."""
    counts = np.diff(np.nan_to_num(np.stack([values for _, values in series])), axis=0, prepend=0)
    minutes = (times - times[0]) / 60
    axes.pcolormesh(minutes, np.arange(len(series)), np.sqrt(np.maximum(counts, 0)), cmap="Blues", shading="nearest")
    finish(axes, "none")
    axes.set_yticks(np.arange(len(series)), [name for name, _ in series])
    axes.grid(visible=False)


def finish(axes: Axes, unit: str) -> None:
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: told(value, unit)))
    axes.yaxis.set_major_locator(MaxNLocator(5))
    axes.xaxis.set_major_locator(MaxNLocator(5, steps=[1, 2, 5, 10]))
    if unit == "bytes":
        step = 2 ** math.ceil(math.log2(max(1.0, axes.get_ylim()[1] / 5)))
        axes.yaxis.set_major_locator(MultipleLocator(step))
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g} min"))
    axes.tick_params(labelsize=7)
    axes.grid(color="#e4e4e4", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.margins(x=0)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)


def told(value: float, unit: str) -> str:
    """The value as Grafana would write it, roughly."""
    if unit == "percentunit":
        return f"{100 * value:.3g} %"
    if unit == "s":
        return f"{1000 * value:.3g} ms" if 0 < value < 1 else f"{value:.3g} s"
    if unit == "bytes":
        return scaled(value, 1024, ("B", "KiB", "MiB", "GiB", "TiB"))
    ends = {"reqps": " /s", "suffix: /s": " /s", "celsius": " °C", "watt": " W", "none": ""}
    return f"{value:.3g}{ends[unit]}"


def scaled(value: float, base: float, names: Sequence[str]) -> str:
    power = 0
    while abs(value) >= base and power < len(names) - 1:
        value, power = value / base, power + 1
    return f"{value:.3g} {names[power]}"


if __name__ == "__main__":
    main()
