"""Reports in, Prometheus text out; read back with Prometheus' own parser."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import version

import numpy as np
import pytest
from prometheus_client.parser import text_string_to_metric_families

from app.jobs.job import Job
from app.metrics import Metrics
from app.report import Announce, Evicted, Memory, ModelState, Result, Tick, Timings
from tests.parts.supervising import job


@dataclass
class Workers:
    states: dict[str, ModelState] = field(default_factory=lambda: {"a": ModelState("a", "ready")})
    restarts: int = 0
    ready: bool = True
    live: int = 1
    queues: list[float] = field(default_factory=lambda: [0.0])
    counts: tuple[int, int] = (0, 0)
    lacking: int = 0
    replayed: Counter[str] = field(default_factory=Counter)

    def images(self, model: str) -> tuple[int, int]:
        return self.counts

    def stranded(self, model: str) -> int:
        return self.lacking


def read(metrics: Metrics, workers: Workers | None = None) -> dict[tuple[str, ...], float]:
    """Samples by (name, label values sorted by label name)."""
    metrics.refresh(workers or Workers())
    text = metrics.text().decode()
    return {
        (sample.name, *(value for _, value in sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def tick(phase: str = "denoise", rows: int = 3, passes: int = 8, padding: int = 2, seconds: float = 0.2, **more: int):
    return Tick("a", phase, rows, passes, padding, more.pop("cap", 16), seconds, rows, 0, **more)  # type: ignore[arg-type]


def answered(*queues: float) -> Job:
    """A job with a result for each of these seconds in the queue."""
    asked = job(model="a", seeds=range(len(queues)))
    for index, queue in enumerate(queues):
        timings = Timings(queue, 0.1, 0.2, 0.3, 4, 1.0)
        asked.hear(Result(asked.request.id, index, index, np.zeros((1, 1, 3), np.uint8), timings))
    return asked


def test_ticks_are_counted_by_phase() -> None:
    metrics = Metrics()
    ticks = tick(), tick(), tick("source", seconds=0.5), tick("encode", seconds=0.04), tick("decode", seconds=3.0)
    for one in (*ticks, Announce("idle", 1.0)):
        metrics.observe(one)
    seen = read(metrics)
    assert seen["instep_denoise_step_seconds_count", "a"] == 2
    assert seen["instep_denoise_step_seconds_sum", "a"] == pytest.approx(0.4)
    assert seen["instep_text_encode_seconds_sum", "a"] == pytest.approx(0.04)
    assert seen["instep_vae_encode_seconds_sum", "a"] == pytest.approx(0.5)
    assert seen["instep_vae_decode_seconds_sum", "a"] == pytest.approx(3.0)
    assert seen["instep_padding_passes_total", "a"] == 4
    assert seen["instep_batch_rows_sum", "a"] == 6
    assert seen["instep_batch_passes_sum", "a"] == 12
    assert seen["instep_denoise_step_seconds_bucket", "0.1", "a"] == 0
    assert seen["instep_denoise_step_seconds_bucket", "0.25", "a"] == 2


def test_a_first_forward_that_did_not_fit_counts_as_out_of_memory_alone() -> None:
    metrics = Metrics()
    metrics.observe(tick(rows=0, passes=0, padding=0, cap=0, seconds=0.0, out_of_memory=1))
    seen = read(metrics)
    assert seen["instep_oom_total", "a"] == 1 and not [name for name in seen if "_step_seconds" in name[0]]


def test_gauges_rise_and_return_to_zero() -> None:
    metrics, workers = Metrics(), Workers()
    for workers.counts, seen in (((0, 5), [0, 5]), ((3, 5), [3, 2]), ((0, 0), [0, 0])):
        assert [read(metrics, workers)[f"instep_num_requests_{name}", "a"] for name in ("running", "waiting")] == seen


def test_images_that_wait_are_counted_by_what_they_wait_for() -> None:
    metrics, workers = Metrics(), Workers()
    for workers.counts, workers.lacking, queue, engine in (((0, 0), 0, 0, 0), ((2, 9), 3, 4, 3), ((0, 3), 3, 0, 3)):
        seen = read(metrics, workers)
        reasons = [seen["instep_num_requests_waiting_by_reason", "a", reason] for reason in ("queue", "engine")]
        assert reasons == [queue, engine] and sum(reasons) == seen["instep_num_requests_waiting", "a"]


def test_a_model_that_is_removed_has_no_images_any_more() -> None:
    metrics, workers = Metrics(), Workers(counts=(2, 9), lacking=3)
    names = {name for name, *labels in read(metrics, workers) if name.startswith("instep_num_") and labels[0] == "a"}
    assert len(names) == 3
    workers.states = {}
    assert not names & {name for name, *_ in read(metrics, workers)}


def test_requests_that_began_again_are_counted_once_however_often_they_are_read() -> None:
    metrics, workers = Metrics(), Workers()
    assert read(metrics, workers)["instep_requests_replayed_total", "a"] == 0
    workers.replayed.update(a=3, other=1)
    for _ in range(2):
        assert read(metrics, workers)["instep_requests_replayed_total", "a"] == 3
    workers.replayed.update(a=2)
    assert read(metrics, workers)["instep_requests_replayed_total", "a"] == 5


def test_outcomes() -> None:
    metrics = Metrics()
    metrics.answered(answered(0.5, 1.5), seconds=2.5, encode_seconds=0.01)
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


def test_occupancy_is_of_the_passes_that_are_not_padding() -> None:
    metrics = Metrics()
    for one in (tick(passes=8, padding=2, cap=12), tick(passes=16, padding=0), tick(cap=0), tick("decode")):
        metrics.observe(one)
    seen = read(metrics)
    assert seen["instep_batch_occupancy_ratio_count", "a"] == 2
    assert seen["instep_batch_occupancy_ratio_sum", "a"] == 1.5
    assert seen["instep_batch_occupancy_ratio_bucket", "0.5", "a"] == 1
    assert seen["instep_batch_occupancy_ratio_bucket", "1.0", "a"] == 2


def test_a_forward_is_never_more_than_full() -> None:
    metrics = Metrics()
    metrics.observe(tick(rows=1, passes=2, padding=0, cap=1))
    assert read(metrics)["instep_batch_occupancy_ratio_sum", "a"] == 1


def test_each_forward_that_ran_out_of_memory_is_counted_once() -> None:
    metrics = Metrics()
    assert read(metrics)["instep_oom_total", "a"] == 0
    metrics.observe(tick(out_of_memory=2))
    metrics.observe(tick("decode", out_of_memory=1))
    metrics.failed("a", "insufficient_gpu_memory")
    assert read(metrics)["instep_oom_total", "a"] == 3


def test_texts_that_were_encoded_before_are_counted() -> None:
    metrics = Metrics()
    names = ("instep_text_cache_hits_total", "instep_text_cache_misses_total")
    assert [read(metrics)[name, "a"] for name in names] == [0, 0]
    for one in (tick("encode", text_hits=2, text_misses=4), tick("encode", text_hits=3), tick()):
        metrics.observe(one)
    assert [read(metrics)[name, "a"] for name in names] == [5, 4]


def test_outcomes_add_up_and_start_at_zero() -> None:
    metrics = Metrics()
    outcomes = ("answered", "failed", "cancelled", "refused")
    assert [read(metrics)["instep_requests_total", "a", outcome] for outcome in outcomes] == [0, 0, 0, 0]
    metrics.answered(answered(0.5, 0.5), seconds=1.0, encode_seconds=0.1)
    metrics.failed("a", "internal_error")
    metrics.failed("a", "cancelled")
    metrics.rejected("a", "overloaded")
    assert [read(metrics)["instep_requests_total", "a", outcome] for outcome in outcomes] == [1, 1, 1, 1]


def test_loads_are_changes_of_state() -> None:
    metrics = Metrics()
    states = ("loading", "ready", "ready", "absent", "loading", "ready", "absent", "loading", "failed", "failed")
    for state in states:
        metrics.observe(ModelState("a", state, seconds=1.0))  # type: ignore[arg-type]
    assert read(metrics)["instep_model_loads_total", "a", "ready"] == 2
    assert read(metrics)["instep_model_loads_total", "a", "failed"] == 1


def test_a_load_counts_on_each_worker() -> None:
    metrics = Metrics()
    for worker, state in (("cpu", "ready"), ("cpu#1", "loading"), ("cpu#1", "failed"), ("cpu", "ready")):
        metrics.observe(ModelState("a", state), worker)  # type: ignore[arg-type]
    assert [read(metrics)["instep_model_loads_total", "a", result] for result in ("ready", "failed")] == [1, 1]


def test_evictions_and_memory() -> None:
    metrics = Metrics()
    assert read(metrics)["instep_model_evictions_total", "a", "away"] == 0
    metrics.observe(Memory({"weights": 7, "slots": 2, "parked": 0, "budget": 10}), "cuda:0")
    for one in (Evicted("a", "transformer", "host", 5), Evicted("a", "vae", "host", 1), Evicted("a", "vae", "away", 1)):
        metrics.observe(one)
    metrics.observe(Memory({"weights": 0, "slots": 0, "parked": 5, "budget": 10}), "cuda:0")
    seen = read(metrics)
    assert (seen["instep_model_evictions_total", "a", "host"], seen["instep_model_evictions_total", "a", "away"]) == (
        2,
        1,
    )
    memory = {kind: seen["instep_device_memory_bytes", "cuda:0", kind] for kind in ("weights", "slots", "parked")}
    assert memory == {"weights": 0, "slots": 0, "parked": 5}


def test_an_evicted_model_is_not_loaded() -> None:
    metrics, workers = Metrics(), Workers(states={"a": ModelState("a", "absent")})
    seen = read(metrics, workers)
    assert [seen[name, "a"] for name in ("instep_model_loaded", "instep_num_requests_running")] == [0, 0]


def test_the_service_as_a_whole() -> None:
    metrics = Metrics()
    seen = read(metrics, Workers(ready=False, live=1, queues=[2.5, 0.0]))
    assert (seen["instep_ready",], seen["instep_workers_live",], seen["instep_workers",]) == (0, 1, 2)
    assert (seen["instep_queue_device_seconds", "0"], seen["instep_queue_device_seconds", "1"]) == (2.5, 0)
    assert seen["instep_build_info", version("instep")] == 1
    assert seen["process_resident_memory_bytes",] > 1 << 20


def test_two_apps_do_not_share_a_registry() -> None:
    one, other = Metrics(), Metrics()
    one.observe(tick())
    assert ("instep_batch_rows_count", "a") not in read(other)
