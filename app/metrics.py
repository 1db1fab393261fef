"""Metrics: what the reports and the requests add up to, in Prometheus' text format."""

from __future__ import annotations

from collections import Counter as Tally
from contextlib import suppress
from importlib import metadata

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    Histogram,
    ProcessCollector,
    disable_created_metrics,
    generate_latest,
)

from app.jobs.job import Job
from app.report import Evicted, Memory, ModelState, Report, Tick
from app.worker.supervisor import Supervisor

__all__ = ["CONTENT_TYPE", "Metrics"]

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1)

GAUGES = {
    "num_requests_running": ("Images in the last batch that are not yet answered", "model"),
    "num_requests_waiting": ("Images accepted, not yet answered and not in a batch", "model"),
    "model_loaded": ("1 while a worker has the model ready", "model"),
    "model_load_seconds": ("How long the last load took", "model"),
    "device_memory_bytes": (
        "weights, slots, text: on the device; parked: held in host memory; budget: what weights may take",
        "device",
        "kind",
    ),
    "ready": ("1 while /readyz says so",),
    "workers_live": ("Engine processes that are able to work",),
    "workers": ("Engine processes that there should be: the entries of DEVICES",),
    "queue_device_seconds": ("Estimated device time of what is not yet answered", "worker"),
    "build_info": ("Always 1", "version"),
}
"""Name to help and labels."""

HISTOGRAMS = {
    "request_queue_time_seconds": ("From acceptance to the first step of an image, less its encode", SECONDS),
    "e2e_request_latency_seconds": ("From the request to its encoded images", SECONDS),
    "image_encode_seconds": ("PNG, JPEG or WebP encoding of one request", SECONDS),
    "text_encode_seconds": ("One forward of the text encoders or label embeddings", SECONDS),
    "denoise_step_seconds": ("One forward of the network with its update", SECONDS),
    "vae_decode_seconds": ("One forward of the image decoder", SECONDS),
    "batch_rows": ("Images that shared a denoising forward", COUNTS),
    "batch_passes": ("Passes of a denoising forward, without padding", COUNTS),
    "batch_occupancy_ratio": (
        "Passes of a denoising forward, without padding, over the most that pay on this device",
        SHARES,
    ),
}
"""Name to help and buckets, each by model."""

COUNTERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "images": ("Images answered", "", ()),
    "requests": ("Requests by how they ended", "outcome", ("answered", "failed", "cancelled", "refused")),
    "requests_failed": ("Requests that were accepted and failed", "reason", ()),
    "requests_rejected": ("Requests that were refused", "reason", ()),
    "padding_passes": ("Passes of denoising forwards that only filled a bucket", "", ()),
    "oom": ("Forwards that ran out of memory and were split or failed", "", ()),
    "text_cache_hits": ("Texts that a text encoder had encoded before, by encoder", "", ()),
    "text_cache_misses": ("Texts that a text encoder had to encode, by encoder", "", ()),
    "model_loads": ("Loads of a model by how they ended", "result", ("ready", "failed")),
    "model_evictions": ("Parts of a model that left the device", "to", ("host", "away")),
}
"""Name to help, a label beside the model, and all its values if they are known."""

PHASES = {"encode": "text_encode_seconds", "denoise": "denoise_step_seconds", "decode": "vae_decode_seconds"}

# A second series beside every counter, which Prometheus does not need.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Metrics:
    """One registry with all instruments. All methods but `text` belong to the front's event loop.

    Counters of a known model stand at 0 from the start: `increase()` does not see a series' first value.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._in_flight: Tally[str] = Tally()
        self._states: dict[tuple[str, str], str] = {}
        self._restarts = 0
        self._gauges = {
            name: Gauge(f"instep_{name}", text, labels, registry=self.registry)
            for name, (text, *labels) in GAUGES.items()
        }
        self._histograms = {
            name: Histogram(f"instep_{name}", text, ["model"], registry=self.registry, buckets=buckets)
            for name, (text, buckets) in HISTOGRAMS.items()
        }
        self._counters = {
            name: Counter(f"instep_{name}", text, ["model", label] if label else ["model"], registry=self.registry)
            for name, (text, label, _) in COUNTERS.items()
        }
        self._restarted = Counter("instep_worker_restarts", "Engine processes started again", registry=self.registry)
        with suppress(metadata.PackageNotFoundError):
            self._set("build_info", 1, metadata.version("instep"))
        ProcessCollector(registry=self.registry)

    def observe(self, report: Report, worker: str = "") -> None:
        """Count any report of the worker with this name; the kinds that are not counted here pass by."""
        match report:
            case Tick():
                self._tick(report)
            case ModelState():
                self._state(report, worker)
            case Evicted(model, to=to):
                self._add("model_evictions", model, to)
            case Memory(device, kinds):
                for kind, size in kinds.items():
                    self._set("device_memory_bytes", size, device, kind)

    def started(self, job: Job) -> None:
        """A job was accepted; it is in flight until its future ends."""
        model, images = job.request.recipe.model, len(job.request.images)
        self._in_flight[model] += images
        job.future.add_done_callback(lambda _: self._in_flight.subtract({model: images}))

    def answered(self, job: Job, seconds: float, encode_seconds: float) -> None:
        """A job was answered after `seconds` in all, `encode_seconds` of them in imaging."""
        model = job.request.recipe.model
        for result in job.results.values():
            self._add("images", model)
            self._observe("request_queue_time_seconds", model, result.timings.queue)
        self._observe("e2e_request_latency_seconds", model, seconds)
        self._observe("image_encode_seconds", model, encode_seconds)
        self._add("requests", model, "answered")

    def failed(self, model: str, reason: str) -> None:
        """An accepted request failed; reason: an error code. "cancelled" is the client's doing and an outcome apart.

        model: a card's id, or "" where the client left before its body was read.
        """
        self._add("requests_failed", model, reason)
        self._add("requests", model, "cancelled" if reason == "cancelled" else "failed")

    def rejected(self, model: str, reason: str) -> None:
        """A request was refused; model: a card's id, or "" when it named none that exists; reason: an error code."""
        self._add("requests_rejected", model, reason)
        self._add("requests", model, "refused")

    def text(self) -> bytes:
        """The exposition text. NOTE: 20 ms for eight models; a thread's work where an event loop must not wait."""
        return generate_latest(self.registry)

    def refresh(self, workers: Supervisor) -> None:
        """Set the gauges to what is true now, before `text`."""
        batched = workers.batched
        for model, state in workers.states.items():
            self._start_at_zero(model)
            in_flight = self._in_flight[model]
            running = min(in_flight, batched.get(model, 0))
            self._set("num_requests_running", running, model)
            self._set("num_requests_waiting", in_flight - running, model)
            self._set("model_loaded", state.state == "ready", model)
        queues = workers.queues
        for worker, seconds in enumerate(queues):
            self._set("queue_device_seconds", seconds, str(worker))
        self._set("ready", workers.ready)
        self._set("workers_live", workers.live)
        self._set("workers", len(queues))
        self._restarted.inc(workers.restarts - self._restarts)
        self._restarts = workers.restarts

    def _start_at_zero(self, model: str) -> None:
        for name, (_, label, values) in COUNTERS.items():
            for value in values:
                self._counters[name].labels(model, value)
            if not label:
                self._counters[name].labels(model)

    def _state(self, state: ModelState, worker: str) -> None:
        """NOTE: "ready" comes again whenever a rate was measured; a load is a change of state."""
        if state.state == "ready" and state.seconds:
            self._set("model_load_seconds", state.seconds, state.model)
        before, self._states[worker, state.model] = self._states.get((worker, state.model)), state.state
        if state.state in ("ready", "failed") and before != state.state:
            self._add("model_loads", state.model, state.state)

    def _tick(self, tick: Tick) -> None:
        self._add("oom", tick.model, by=tick.out_of_memory)
        if not tick.rows:
            return
        self._observe(PHASES[tick.phase], tick.model, tick.seconds)
        self._add("text_cache_hits", tick.model, by=tick.text_hits)
        self._add("text_cache_misses", tick.model, by=tick.text_misses)
        if tick.phase == "denoise":
            passes = tick.passes - tick.padding
            self._add("padding_passes", tick.model, by=tick.padding)
            self._observe("batch_rows", tick.model, tick.rows)
            self._observe("batch_passes", tick.model, passes)
            if tick.cap:
                # One guided image makes two passes, also where only one pays: such a forward is full, not more.
                self._observe("batch_occupancy_ratio", tick.model, min(1.0, passes / tick.cap))

    def _set(self, name: str, value: float, *labels: str) -> None:
        gauge = self._gauges[name]
        (gauge.labels(*labels) if labels else gauge).set(value)

    def _add(self, name: str, *labels: str, by: int = 1) -> None:
        self._counters[name].labels(*labels).inc(by)

    def _observe(self, name: str, model: str, value: float) -> None:
        self._histograms[name].labels(model).observe(value)
