"""Metrics: what the reports and the requests add up to, in Prometheus' text format.

Knows nothing of HTTP routes. The only home of prometheus_client.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from importlib import metadata
from typing import Protocol

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

from app.gpu import READINGS, Gpus
from app.report import Evicted, Memory, ModelState, Report, Result, Tick

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)
SHARES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875, 1)
OUTCOMES = ("answered", "failed", "cancelled", "refused")

__all__ = ["CONTENT_TYPE", "Metrics", "Workers"]

# A second series beside every counter, which Prometheus does not need.
disable_created_metrics()  # type: ignore[no-untyped-call]


class Workers(Protocol):
    """What `render` asks of the supervisor. queues: device seconds that wait, by worker; batched: images by model."""

    @property
    def states(self) -> Mapping[str, ModelState]: ...

    @property
    def restarts(self) -> int: ...

    @property
    def ready(self) -> bool: ...

    @property
    def live(self) -> int: ...

    @property
    def queues(self) -> Sequence[float]: ...

    @property
    def batched(self) -> Mapping[str, int]: ...


class Metrics:
    """One registry, one set of instruments. All methods but `text` belong to the front's event loop.

    Counters of a known model stand at 0 from the start: `increase()` does not see a series' first value. gpus: what
    the driver says of the GPUs, given by tests.
    """

    def __init__(self, gpus: Gpus | None = None) -> None:
        self.registry = CollectorRegistry()
        self._gpus = gpus or Gpus()
        self._in_flight: Tally[str] = Tally()
        self._states: dict[tuple[str, str], str] = {}
        self._restarts = 0
        self._make_requests()
        self._make_batches()
        self._make_models()
        self._make_service()

    def _make_requests(self) -> None:
        self._running = self._gauge("num_requests_running", "Images in the last batch that are not yet answered")
        self._waiting = self._gauge("num_requests_waiting", "Images accepted, not yet answered and not in a batch")
        waited = "From acceptance to the first step of an image, less its encode"
        self._queue = self._seconds("request_queue_time_seconds", waited)
        self._latency = self._seconds("e2e_request_latency_seconds", "From the request to its encoded images")
        self._image_encode = self._seconds("image_encode_seconds", "PNG, JPEG or WebP encoding of one request")
        self._images = self._counter("images", "Images answered")
        self._requests = self._counter("requests", "Requests by how they ended", "outcome")
        self._failed = self._counter("requests_failed", "Requests that were accepted and failed", "reason")
        self._rejected = self._counter("requests_rejected", "Requests that were refused", "reason")

    def _make_batches(self) -> None:
        self._phases = {
            "encode": self._seconds("text_encode_seconds", "One forward of the text encoders or label embeddings"),
            "denoise": self._seconds("denoise_step_seconds", "One forward of the network with its update"),
            "decode": self._seconds("vae_decode_seconds", "One forward of the image decoder"),
        }
        self._batch_rows = self._histogram("batch_rows", "Images that shared a denoising forward", COUNTS)
        self._batch_passes = self._histogram("batch_passes", "Passes of a denoising forward, without padding", COUNTS)
        text = "Passes of a denoising forward, without padding, over the most that pay on this device"
        self._occupancy = self._histogram("batch_occupancy_ratio", text, SHARES)
        self._padding = self._counter("padding_passes", "Passes of denoising forwards that only filled a bucket")
        self._oom = self._counter("oom", "Forwards that ran out of memory and were split or failed")
        self._hits = self._counter("text_cache_hits", "Texts that a text encoder had encoded before, by encoder")
        self._misses = self._counter("text_cache_misses", "Texts that a text encoder had to encode, by encoder")

    def _make_models(self) -> None:
        self._loaded = self._gauge("model_loaded", "1 while a worker has the model ready")
        self._load = self._gauge("model_load_seconds", "How long the last load took")
        self._loads = self._counter("model_loads", "Loads of a model by how they ended", "result")
        self._evicted = self._counter("model_evictions", "Parts of a model that left the device", "to")
        text = "weights, slots, text: on the device; parked: held in host memory; budget: what weights may take"
        self._memory = self._plain("device_memory_bytes", text, "device", "kind")

    def _make_service(self) -> None:
        self._ready = self._plain("ready", "1 while /readyz says so")
        self._live = self._plain("workers_live", "Engine processes that are able to work")
        self._workers = self._plain("workers", "Engine processes that there should be: the entries of DEVICES")
        self._ahead = self._plain("queue_device_seconds", "Estimated device time of what is not yet answered", "worker")
        self._restarted = Counter("instep_worker_restarts", "Engine processes started again", registry=self.registry)
        self._gpu = {name: self._plain(name, "What the driver says of the GPU", "device") for name in READINGS}
        with suppress(metadata.PackageNotFoundError):
            self._plain("build_info", "Always 1", "version").labels(metadata.version("instep")).set(1)
        ProcessCollector(registry=self.registry)

    def observe(self, report: Report, worker: str = "") -> None:
        """Any report of any worker, which is told apart by its name; the kinds that are not counted here pass by."""
        match report:
            case Tick():
                self._tick(report)
            case ModelState():
                self._state(report, worker)
            case Evicted(model, to=to):
                self._evicted.labels(model, to).inc()
            case Memory(device, kinds):
                for kind, size in kinds.items():
                    self._memory.labels(device, kind).set(size)

    def started(self, model: str, images: int) -> None:
        """A request was accepted. Every `started` is followed by one `ended`."""
        self._in_flight[model] += images

    def ended(self, model: str, images: int) -> None:
        """A request is over, however it ended."""
        self._in_flight[model] -= images

    def answered(self, model: str, results: Iterable[Result], seconds: float, encode_seconds: float) -> None:
        """A request was answered with these images after `seconds` in all, `encode_seconds` of them in imaging."""
        for result in results:
            self._images.labels(model).inc()
            self._queue.labels(model).observe(result.timings.queue)
        self._latency.labels(model).observe(seconds)
        self._image_encode.labels(model).observe(encode_seconds)
        self._requests.labels(model, "answered").inc()

    def failed(self, model: str, reason: str) -> None:
        """An accepted request failed; reason: an error code. "cancelled" is the client's doing and an outcome apart.

        model: a card's id, or "" where the client left before its body was read.
        """
        self._failed.labels(model, reason).inc()
        self._requests.labels(model, "cancelled" if reason == "cancelled" else "failed").inc()

    def rejected(self, model: str, reason: str) -> None:
        """A request was refused; model: a card's id, or "" when it named none that exists; reason: an error code."""
        self._rejected.labels(model, reason).inc()
        self._requests.labels(model, "refused").inc()

    def render(self, workers: Workers) -> bytes:
        """The exposition text, with gauges as of now."""
        self.refresh(workers)
        return self.text()

    def text(self) -> bytes:
        """The exposition text. NOTE: 20 ms for eight models; a thread's work where an event loop must not wait."""
        return generate_latest(self.registry)

    def refresh(self, workers: Workers) -> None:
        """Set the gauges to what is true now."""
        batched = workers.batched
        for model, state in workers.states.items():
            self._stand(model)
            in_flight = self._in_flight[model]
            running = min(in_flight, batched.get(model, 0))
            self._running.labels(model).set(running)
            self._waiting.labels(model).set(in_flight - running)
            self._loaded.labels(model).set(state.state == "ready")
        queues = workers.queues
        for worker, seconds in enumerate(queues):
            self._ahead.labels(str(worker)).set(seconds)
        self._ready.set(workers.ready)
        self._live.set(workers.live)
        self._workers.set(len(queues))
        self._restarted.inc(workers.restarts - self._restarts)
        self._restarts = workers.restarts
        self._show_gpus()

    def _stand(self, model: str) -> None:
        """Let this model's counters be there, at 0."""
        for outcome in OUTCOMES:
            self._requests.labels(model, outcome)
        for result in ("ready", "failed"):
            self._loads.labels(model, result)
        for to in ("host", "away"):
            self._evicted.labels(model, to)
        for counter in (self._images, self._padding, self._oom, self._hits, self._misses):
            counter.labels(model)

    def _show_gpus(self) -> None:
        for gauge in self._gpu.values():
            gauge.clear()
        for device, figures in self._gpus.figures().items():
            for name, value in figures.items():
                self._gpu[name].labels(device).set(value)

    def _state(self, state: ModelState, worker: str) -> None:
        """NOTE: "ready" is told again whenever a rate was measured; a load is a change of state."""
        if state.state == "ready" and state.seconds:
            self._load.labels(state.model).set(state.seconds)
        before, self._states[worker, state.model] = self._states.get((worker, state.model)), state.state
        if state.state in ("ready", "failed") and before != state.state:
            self._loads.labels(state.model, state.state).inc()

    def _tick(self, tick: Tick) -> None:
        self._oom.labels(tick.model).inc(tick.out_of_memory)
        if not tick.rows:
            return
        self._phases[tick.phase].labels(tick.model).observe(tick.seconds)
        self._hits.labels(tick.model).inc(tick.text_hits)
        self._misses.labels(tick.model).inc(tick.text_misses)
        if tick.phase == "denoise":
            passes = tick.passes - tick.padding
            self._padding.labels(tick.model).inc(tick.padding)
            self._batch_rows.labels(tick.model).observe(tick.rows)
            self._batch_passes.labels(tick.model).observe(passes)
            if tick.cap:
                # One guided image makes two passes, also where only one pays: such a forward is full, not more.
                self._occupancy.labels(tick.model).observe(min(1.0, passes / tick.cap))

    def _plain(self, name: str, text: str, *labels: str) -> Gauge:
        return Gauge(f"instep_{name}", text, labels, registry=self.registry)

    def _gauge(self, name: str, text: str) -> Gauge:
        return self._plain(name, text, "model")

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"instep_{name}", text, ["model", *labels], registry=self.registry)

    def _seconds(self, name: str, text: str) -> Histogram:
        return self._histogram(name, text, SECONDS)

    def _histogram(self, name: str, text: str, buckets: Sequence[float]) -> Histogram:
        return Histogram(f"instep_{name}", text, ["model"], registry=self.registry, buckets=buckets)
