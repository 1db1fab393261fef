"""Metrics: what the reports and the requests add up to, in Prometheus' text format."""

from __future__ import annotations

from importlib import metadata
from typing import Any

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

INSTRUMENTS: dict[str, tuple[type[Gauge | Histogram | Counter], str, tuple[str, ...]]] = {
    "num_requests_running": (Gauge, "Images in the last batch that are not yet answered", ("model",)),
    "num_requests_waiting": (Gauge, "Images accepted, not yet answered and not in a batch", ("model",)),
    "num_requests_waiting_by_reason": (
        Gauge, "The same by what they wait for: queue, or engine while no engine process lives", ("model", "reason")
    ),
    "model_loaded": (Gauge, "1 while a worker has the model ready", ("model",)),
    "model_load_seconds": (Gauge, "Seconds that the last load took", ("model",)),
    "device_memory_bytes": (
        Gauge,
        "weights, slots, text: on the device; parked: in host memory; budget: the limit for weights",
        ("device", "kind"),
    ),
    "ready": (Gauge, "1 while /readyz answers 200", ()),
    "workers_live": (Gauge, "Engine processes that are able to work", ()),
    "workers": (Gauge, "Engine processes that should run: the entries of DEVICES", ()),
    "worker_restarts": (Counter, "Engine processes that were started again", ()),
    "queue_device_seconds": (Gauge, "Estimated device time of the unanswered requests", ("worker",)),
    "build_info": (Gauge, "Always 1", ("version",)),
    "request_queue_time_seconds": (
        Histogram, "From acceptance to the first step of an image, without text encoding", ("model",)
    ),
    "e2e_request_latency_seconds": (Histogram, "From the request to its encoded images", ("model",)),
    "image_encode_seconds": (Histogram, "PNG, JPEG or WebP encoding of one request", ("model",)),
    "text_encode_seconds": (Histogram, "One forward of the text encoders or label embeddings", ("model",)),
    "denoise_step_seconds": (Histogram, "One forward of the network with its update", ("model",)),
    "vae_encode_seconds": (Histogram, "One forward of the image encoder, for pictures to start from", ("model",)),
    "vae_decode_seconds": (Histogram, "One forward of the image decoder", ("model",)),
    "batch_rows": (Histogram, "Images that shared a denoising forward", ("model",)),
    "batch_passes": (Histogram, "Passes of a denoising forward, without padding", ("model",)),
    "batch_occupancy_ratio": (
        Histogram, "Passes of a denoising forward, without padding, as a share of the widest that pays here", ("model",)
    ),
    "images": (Counter, "Images answered", ("model",)),
    "requests": (Counter, "Requests by their outcome", ("model", "outcome")),
    "requests_failed": (Counter, "Requests that were accepted and failed", ("model", "reason")),
    "requests_replayed": (Counter, "Requests that another engine process began again", ("model",)),
    "requests_rejected": (Counter, "Requests that were refused", ("model", "reason")),
    "padding_passes": (Counter, "Passes of denoising forwards that only filled a bucket", ("model",)),
    "oom": (Counter, "Forwards that ran out of memory and were split or failed", ("model",)),
    "text_cache_hits": (Counter, "Texts found in the cache of encoded prompts, by encoder", ("model",)),
    "text_cache_misses": (Counter, "Texts that a text encoder had to encode, by encoder", ("model",)),
    "model_loads": (Counter, "Loads of a model by their result", ("model", "result")),
    "model_evictions": (Counter, "Parts of a model that left the device", ("model", "to")),
}  # fmt: skip
"""Name to kind, help and labels."""

BUCKETS = {"batch_rows": COUNTS, "batch_passes": COUNTS, "batch_occupancy_ratio": SHARES}
"""Of the histograms that are not of seconds."""

VALUES = {
    "requests": ("answered", "failed", "cancelled", "refused"),
    "model_loads": ("ready", "failed"),
    "model_evictions": ("host", "away"),
}
"""The values that are known beforehand of a label beside the model."""

PHASES = {
    "source": "vae_encode_seconds",
    "encode": "text_encode_seconds",
    "denoise": "denoise_step_seconds",
    "decode": "vae_decode_seconds",
}

# A second series beside every counter, which Prometheus does not need.
disable_created_metrics()  # type: ignore[no-untyped-call]


def version() -> str:
    """The installed version; "0" in a tree that was never installed."""
    try:
        return metadata.version("instep")
    except metadata.PackageNotFoundError:
        return "0"


class Metrics:
    """One registry with all instruments. All methods but `text` belong to the front's event loop.

    Counters of a known model stand at 0 from the start: `increase()` does not see a series' first value.
    """

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._states: dict[tuple[str, str], str] = {}
        self._restarts = 0
        self._instruments: dict[str, Any] = {}
        for name, (kind, text, labels) in INSTRUMENTS.items():
            more: dict[str, Any] = {"buckets": BUCKETS.get(name, SECONDS)} if kind is Histogram else {}
            self._instruments[name] = kind(f"instep_{name}", text, labels, registry=self.registry, **more)
        self._of("build_info", version()).set(1)
        ProcessCollector(registry=self.registry)

    def observe(self, report: Report, worker: str = "") -> None:
        """Count any report of the worker with this name; the kinds that are not counted here pass by."""
        match report:
            case Tick():
                self._tick(report)
            case ModelState():
                self._state(report, worker)
            case Evicted(model, to=to):
                self._of("model_evictions", model, to).inc()
            case Memory(kinds):
                for kind, size in kinds.items():
                    self._of("device_memory_bytes", worker, kind).set(size)

    def answered(self, job: Job, seconds: float, encode_seconds: float) -> None:
        """A job was answered after `seconds` in all, `encode_seconds` of them in imaging."""
        model = job.request.recipe.model
        for result in job.results.values():
            self._of("images", model).inc()
            self._of("request_queue_time_seconds", model).observe(result.timings.queue)
        self._of("e2e_request_latency_seconds", model).observe(seconds)
        self._of("image_encode_seconds", model).observe(encode_seconds)
        self._of("requests", model, "answered").inc()

    def failed(self, model: str, reason: str) -> None:
        """An accepted request failed; reason: an error code. "cancelled" is the client's doing and an outcome apart.

        model: a card's id, or "" where the client left before its body was read.
        """
        self._of("requests_failed", model, reason).inc()
        self._of("requests", model, "cancelled" if reason == "cancelled" else "failed").inc()

    def rejected(self, model: str, reason: str) -> None:
        """A request was refused; model: a card's id, or "" when it named none that exists; reason: an error code."""
        self._of("requests_rejected", model, reason).inc()
        self._of("requests", model, "refused").inc()

    def text(self) -> bytes:
        """The exposition text. NOTE: 20 ms for eight models; a thread's work where an event loop must not wait."""
        return generate_latest(self.registry)

    def refresh(self, workers: Supervisor) -> None:
        """Set the gauges to what is true now, before `text`."""
        waiting = "num_requests_waiting", "num_requests_waiting_by_reason"
        for name in ("num_requests_running", *waiting, "model_loaded"):  # some may be of removed models
            self._of(name).clear()
        for model, state in workers.states.items():
            self._start_at_zero(model)
            running, images = workers.images(model)
            self._of("num_requests_running", model).set(running)
            self._of("num_requests_waiting", model).set(images - running)
            stranded = workers.stranded(model)
            self._of("num_requests_waiting_by_reason", model, "engine").set(stranded)
            self._of("num_requests_waiting_by_reason", model, "queue").set(images - running - stranded)
            replayed = workers.replayed.pop(model, 0)
            self._of("requests_replayed", model).inc(replayed)
            self._of("model_loaded", model).set(state.state == "ready")
        queues = workers.queues
        for worker, seconds in enumerate(queues):
            self._of("queue_device_seconds", str(worker)).set(seconds)
        self._of("ready").set(workers.ready)
        self._of("workers_live").set(workers.live)
        self._of("workers").set(len(queues))
        self._of("worker_restarts").inc(workers.restarts - self._restarts)
        self._restarts = workers.restarts

    def _of(self, name: str, *labels: str) -> Any:
        """The instrument, or its child with these labels."""
        return self._instruments[name].labels(*labels) if labels else self._instruments[name]

    def _start_at_zero(self, model: str) -> None:
        for name, (kind, _, labels) in INSTRUMENTS.items():
            if kind is Counter and labels == ("model",):
                self._of(name, model)
            for value in VALUES.get(name, ()):
                self._of(name, model, value)

    def _state(self, state: ModelState, worker: str) -> None:
        """NOTE: "ready" comes again whenever a rate was measured; a load is a change of state."""
        if state.state == "ready" and state.seconds:
            self._of("model_load_seconds", state.model).set(state.seconds)
        before, self._states[worker, state.model] = self._states.get((worker, state.model)), state.state
        if state.state in VALUES["model_loads"] and before != state.state:
            self._of("model_loads", state.model, state.state).inc()

    def _tick(self, tick: Tick) -> None:
        model, passes = tick.model, tick.passes - tick.padding
        self._of("oom", model).inc(tick.out_of_memory)
        if not tick.rows:
            return
        self._of(PHASES[tick.phase], model).observe(tick.seconds)
        self._of("text_cache_hits", model).inc(tick.text_hits)
        self._of("text_cache_misses", model).inc(tick.text_misses)
        if tick.phase == "denoise":
            self._of("padding_passes", model).inc(tick.padding)
            self._of("batch_rows", model).observe(tick.rows)
            self._of("batch_passes", model).observe(passes)
            if tick.cap:
                # One guided image makes two passes, also where only one pays: such a forward is full, not more.
                self._of("batch_occupancy_ratio", model).observe(min(1.0, passes / tick.cap))
