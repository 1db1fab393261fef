"""Reports in, Prometheus text out; read back with Prometheus' own parser."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.metrics import Metrics
from app.report import Announce, ModelState, Result, Tick, Timings


@dataclass
class Workers:
    states: dict[str, ModelState] = field(default_factory=lambda: {"a": ModelState("a", "ready")})
    restarts: int = 0


def read(metrics: Metrics, workers: Workers | None = None) -> dict[tuple[str, ...], float]:
    """Samples by (name, label values sorted by label name)."""
    text = metrics.render(workers or Workers()).decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def tick(phase: str = "denoise", rows: int = 3, passes: int = 8, padding: int = 2, seconds: float = 0.2) -> Tick:
    return Tick("a", phase, rows, passes, padding, 16, seconds, rows, 0)  # type: ignore[arg-type]


def result(queue: float = 0.5) -> Result:
    return Result("r", 0, 1, np.zeros((1, 1, 3), np.uint8), Timings(queue, 0.1, 0.2, 0.3, 4, 1.0))


def test_ticks_are_counted_by_phase() -> None:
    metrics = Metrics()
    for one in (tick(), tick(), tick("encode", seconds=0.04), tick("decode", seconds=3.0), Announce("idle", 1.0)):
        metrics.observe(one)
    seen = read(metrics)
    assert seen["instep_denoise_step_seconds_count", "a"] == 2
    assert seen["instep_denoise_step_seconds_sum", "a"] == pytest.approx(0.4)
    assert seen["instep_text_encode_seconds_sum", "a"] == pytest.approx(0.04)
    assert seen["instep_vae_decode_seconds_sum", "a"] == pytest.approx(3.0)
    assert seen["instep_padding_passes_total", "a"] == 8
    assert seen["instep_batch_rows_sum", "a"] == 6
    assert seen["instep_batch_passes_sum", "a"] == 12
    assert seen["instep_denoise_step_seconds_bucket", "0.1", "a"] == 0
    assert seen["instep_denoise_step_seconds_bucket", "0.25", "a"] == 2


def test_gauges_rise_and_return_to_zero() -> None:
    metrics = Metrics()
    metrics.started("a", 5)
    assert [read(metrics)[f"instep_num_requests_{name}", "a"] for name in ("running", "waiting")] == [0, 5]
    metrics.observe(tick(rows=3))
    assert [read(metrics)[f"instep_num_requests_{name}", "a"] for name in ("running", "waiting")] == [3, 2]
    metrics.ended("a", 5)
    assert [read(metrics)[f"instep_num_requests_{name}", "a"] for name in ("running", "waiting")] == [0, 0]


def test_outcomes() -> None:
    metrics = Metrics()
    metrics.answered("a", [result(0.5), result(1.5)], seconds=2.5, encode_seconds=0.01)
    metrics.failed("a", "non_finite_output")
    metrics.rejected("", "model_not_found")
    seen = read(metrics)
    assert seen["instep_images_total", "a"] == 2
    assert seen["instep_request_queue_time_seconds_sum", "a"] == 2.0
    assert seen["instep_e2e_request_latency_seconds_sum", "a"] == 2.5
    assert seen["instep_image_encode_seconds_count", "a"] == 1
    assert seen["instep_requests_failed_total", "a", "non_finite_output"] == 1
    assert seen["instep_requests_rejected_total", "", "model_not_found"] == 1


def test_models_and_restarts() -> None:
    metrics, workers = Metrics(), Workers()
    metrics.observe(ModelState("a", "ready", seconds=7.5))
    assert read(metrics, workers)["instep_model_loaded", "a"] == 1
    assert read(metrics, workers)["instep_model_load_seconds", "a"] == 7.5
    workers.restarts = 2
    workers.states = {"a": ModelState("a", "absent")}
    assert read(metrics, workers)["instep_worker_restarts_total",] == 2
    assert read(metrics, workers)["instep_worker_restarts_total",] == 2
    assert read(metrics, workers)["instep_model_loaded", "a"] == 0


def test_two_apps_do_not_share_a_registry() -> None:
    one, other = Metrics(), Metrics()
    one.observe(tick())
    assert ("instep_batch_rows_count", "a") not in read(other)
