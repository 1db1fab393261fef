"""Write dashboards/instep.json, Grafana's classic JSON (schema 42), from `service.py` and `engine.py`.

Run it with `python -m deploy.grafana.make`.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from deploy.grafana.engine import BATCHING, ERRORS, POOL
from deploy.grafana.panel import Panel
from deploy.grafana.service import FRONT, LATENCY, OVERVIEW, QUEUE, TRAFFIC

FILE = Path(__file__).parent / "dashboards" / "instep.json"
SOURCE = {"type": "prometheus", "uid": "${datasource}"}
ROWS: tuple[tuple[str, tuple[Panel, ...]], ...] = (
    ("Overview", OVERVIEW),
    ("Traffic", TRAFFIC),
    ("Latency by stage", LATENCY),
    ("Queue", QUEUE),
    ("Batching", BATCHING),
    ("Pool and memory", POOL),
    ("Errors", ERRORS),
    ("Front process", FRONT),
)
HEIGHTS = {"stat": 4, "timeseries": 8, "heatmap": 8}


def dashboard() -> dict[str, Any]:
    """The whole dashboard."""
    return {
        "uid": "instep",
        "title": "Instep",
        "description": "An Instep service: traffic, latency by stage, queue, batching, memory, errors.",
        "tags": ["instep"],
        "schemaVersion": 42,
        "editable": True,
        "graphTooltip": 1,
        "refresh": "15s",
        "timezone": "browser",
        "time": {"from": "now-1h", "to": "now"},
        "annotations": {"list": [alerts()]},
        "templating": {"list": variables()},
        "panels": panels(),
    }


def text() -> str:
    """The content of the file."""
    return json.dumps(dashboard(), indent=2) + "\n"


def alerts() -> dict[str, Any]:
    """A mark on every panel while an alert fires."""
    return {
        "name": "Alerts",
        "enable": True,
        "iconColor": "red",
        "datasource": SOURCE,
        "expr": 'ALERTS{alertstate="firing", alertname=~"Instep.*"}',
        "titleFormat": "{{alertname}}",
        "textFormat": "{{instance}} {{model}}",
    }


def variables() -> list[dict[str, Any]]:
    """The data source, then the replicas and the models of all series."""
    source = {"name": "datasource", "label": "Data source", "type": "datasource", "query": "prometheus"}
    return [source, _choice("instance", "Replica", "instep_ready"), _choice("model", "Model", "instep_model_loaded")]


def _choice(name: str, label: str, metric: str) -> dict[str, Any]:
    """NOTE: `.*` and not the list of all: a request that names no model is counted under the model ""."""
    query = f"label_values({metric}, {name})"
    return {
        "name": name,
        "label": label,
        "type": "query",
        "datasource": SOURCE,
        "query": {"query": query, "refId": "variable"},
        "definition": query,
        "refresh": 2,
        "sort": 1,
        "multi": True,
        "includeAll": True,
        "allValue": ".*",
        "current": {"text": ["All"], "value": ["$__all"]},
    }


def panels() -> list[dict[str, Any]]:
    """Rows and their panels, from left to right and from top to bottom."""
    found: list[dict[str, Any]] = []
    y = 0
    for title, row in ROWS:
        found.append({"id": len(found) + 1, "type": "row", "title": title, "collapsed": False, "panels": []})
        found[-1]["gridPos"] = {"x": 0, "y": y, "w": 24, "h": 1}
        x, y = 0, y + 1
        for panel in row:
            if x + panel.width > 24:
                x, y = 0, y + HEIGHTS[panel.kind]
            place = {"x": x, "y": y, "w": panel.width, "h": HEIGHTS[panel.kind]}
            found.append({"id": len(found) + 1, "gridPos": place, **_panel(panel)})
            x += panel.width
        y += HEIGHTS[row[-1].kind]
    return found


def _panel(panel: Panel) -> dict[str, Any]:
    look = {"stat": _stat, "timeseries": _lines, "heatmap": _heatmap}[panel.kind]
    return {
        "type": panel.kind,
        "title": panel.title,
        "description": panel.text,
        "datasource": SOURCE,
        "targets": [_target(panel, place) for place in range(len(panel.queries))],
        **look(panel),
    }


def _target(panel: Panel, place: int) -> dict[str, Any]:
    expr, legend = panel.queries[place]
    return {
        "refId": "ABCDEF"[place],
        "datasource": SOURCE,
        "expr": expr,
        "legendFormat": legend,
        "range": panel.kind != "stat",
        "instant": panel.kind == "stat",
        "format": "heatmap" if panel.kind == "heatmap" else "time_series",
    }


def _defaults(panel: Panel) -> dict[str, Any]:
    steps = [{"value": value, "color": colour} for value, colour in panel.limits]
    more = {} if panel.most is None else {"max": panel.most}
    return {"unit": panel.unit, "min": 0, **more, "thresholds": {"mode": "absolute", "steps": steps}}


def _stat(panel: Panel) -> dict[str, Any]:
    words = {value: {"text": text, "index": place} for place, (value, text) in enumerate(panel.words)}
    mappings = [{"type": "value", "options": words}] if words else []
    defaults = _defaults(panel) | {"color": {"mode": "thresholds"}, "mappings": mappings, "noValue": "-"}
    return {
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "reduceOptions": {"calcs": ["lastNotNull"], "fields": "", "values": False},
            "colorMode": "value",
            "graphMode": "none",
            "justifyMode": "auto",
            "orientation": "auto",
            "textMode": "value",
            "wideLayout": True,
            "showPercentChange": False,
            "percentChangeColorMode": "standard",
        },
    }


def _lines(panel: Panel) -> dict[str, Any]:
    custom = {
        "drawStyle": "line",
        "lineInterpolation": "linear",
        "lineWidth": 1,
        "fillOpacity": 30 if panel.stack else 0,
        "showPoints": "never",
        "spanNulls": False,
        "stacking": {"group": "A", "mode": "normal" if panel.stack else "none"},
        "thresholdsStyle": {"mode": "dashed" if len(panel.limits) > 1 else "off"},
    }
    defaults = _defaults(panel) | {"color": {"mode": "palette-classic"}, "custom": custom}
    return {
        "fieldConfig": {"defaults": defaults, "overrides": []},
        "options": {
            "legend": {"displayMode": "list", "placement": "bottom", "showLegend": True, "calcs": []},
            "tooltip": {"mode": "multi", "sort": "desc"},
        },
    }


def _heatmap(panel: Panel) -> dict[str, Any]:
    return {
        "fieldConfig": {"defaults": {}, "overrides": []},
        "options": {
            "calculate": False,
            "cellGap": 1,
            "cellValues": {"unit": "none"},
            "color": {
                "mode": "scheme", "scheme": "Blues", "steps": 32, "reverse": True, "exponent": 0.5, "fill": "blue",
            },
            "exemplars": {"color": "red"},
            "filterValues": {"le": 1e-9},
            "legend": {"show": True},
            "rowsFrame": {"layout": "auto"},
            "showValue": "never",
            "tooltip": {"mode": "single", "yHistogram": False, "showColorScale": False},
            "yAxis": {"unit": panel.unit, "axisPlacement": "left", "reverse": False},
        },
    }  # fmt: skip


if __name__ == "__main__":
    FILE.write_text(text(), encoding="utf-8")
    print(f"wrote {FILE}")
