"""A panel of the dashboard: its queries, unit and description; and the pieces of PromQL that queries are made of."""

from __future__ import annotations

from dataclasses import dataclass

Threshold = tuple[float | None, str]

HERE = 'instance=~"$instance"'
MODEL = f'{HERE}, model=~"$model"'
LATELY = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    """queries: (PromQL, legend). limits: (from this value on, colour). width: of 24."""

    title: str
    unit: str
    text: str
    queries: tuple[tuple[str, str], ...]
    kind: str = "timeseries"
    width: int = 8
    stack: bool = False
    limits: tuple[Threshold, ...] = ((None, "green"),)
    most: float | None = None
    words: tuple[tuple[str, str], ...] = ()


def rate(name: str, by: str, labels: str = MODEL) -> str:
    return f"sum by ({by}) (rate(instep_{name}{{{labels}}}{LATELY}))"


def rise(name: str, by: str, labels: str = MODEL) -> str:
    return f"sum by ({by}) (increase(instep_{name}{{{labels}}}{LATELY}))"


def mean(name: str) -> str:
    """Of a histogram, by model."""
    return f"{rate(f'{name}_sum', 'model')} / {rate(f'{name}_count', 'model')}"


def quantile(share: float, name: str, by: str = "le") -> str:
    return f"histogram_quantile({share}, {rate(f'{name}_bucket', by)})"


def stage(title: str, name: str, text: str) -> Panel:
    """The quantiles of one stage's seconds."""
    queries = tuple((quantile(share, name), f"p{round(100 * share)}") for share in (0.5, 0.95, 0.99))
    return Panel(title, "s", text, queries)


def stat(
    title: str, unit: str, text: str, query: str, *limits: Threshold, words: tuple[tuple[str, str], ...] = ()
) -> Panel:
    return Panel(title, unit, text, ((query, title),), "stat", 3, limits=limits or ((None, "blue"),), words=words)


def gpu(title: str, unit: str, query: str, most: float | None = None, *limits: Threshold) -> Panel:
    """A figure of every GPU that dcgm-exporter reports; its targets are not the replicas, so all are shown."""
    text = "For all GPUs, from NVIDIA's dcgm-exporter; empty without it."
    legend = "{{instance}} GPU {{gpu}}"
    return Panel(title, unit, text, ((query, legend),), width=6, most=most, limits=((None, "green"), *limits))
