"""Metrics: what the reports and the requests add up to, in Prometheus' text format.

Knows nothing of HTTP routes. The only home of prometheus_client.
"""

from __future__ import annotations

from collections import Counter as Tally
from collections.abc import Iterable, Mapping
from typing import Protocol

from prometheus_client import CONTENT_TYPE_LATEST as CONTENT_TYPE
from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from app.report import ModelState, Report, Result, Tick

SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2, 4, 8, 15, 30, 60, 120, 300)
COUNTS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128)

__all__ = ["CONTENT_TYPE", "Metrics", "Workers"]


class Workers(Protocol):
    """What `render` asks of the supervisor."""

    @property
    def states(self) -> Mapping[str, ModelState]: ...

    @property
    def restarts(self) -> int: ...


class Metrics:
    """One registry, one set of instruments. All methods belong to the front's event loop."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self._in_flight: Tally[str] = Tally()
        self._rows: Tally[str] = Tally()
        self._restarts = 0
        self._running = self._gauge("num_requests_running", "Images in the last batch that are not yet answered")
        self._waiting = self._gauge("num_requests_waiting", "Images accepted, not yet answered and not in a batch")
        self._queue = self._seconds("request_queue_time_seconds", "From acceptance to the first work on an image")
        self._latency = self._seconds("e2e_request_latency_seconds", "From the request to its encoded images")
        self._phases = {
            "encode": self._seconds("text_encode_seconds", "One forward of the text encoders or label embeddings"),
            "denoise": self._seconds("denoise_step_seconds", "One forward of the network with its update"),
            "decode": self._seconds("vae_decode_seconds", "One forward of the image decoder"),
        }
        self._image_encode = self._seconds("image_encode_seconds", "PNG, JPEG or WebP encoding of one request")
        self._batch_rows = self._counts("batch_rows", "Images that shared a denoising forward")
        self._batch_passes = self._counts("batch_passes", "Passes of a denoising forward, without padding")
        self._padding = self._counter("padding_passes", "Passes that only filled a bucket")
        self._images = self._counter("images", "Images answered")
        self._failed = self._counter("requests_failed", "Requests that were accepted and failed", "reason")
        self._rejected = self._counter("requests_rejected", "Requests that were refused", "reason")
        self._loaded = self._gauge("model_loaded", "1 while a worker has the model ready")
        self._load = self._gauge("model_load_seconds", "How long the last load took")
        self._restarted = Counter("instep_worker_restarts", "Engine processes started again", registry=self.registry)

    def observe(self, report: Report) -> None:
        """Any report of any worker; the kinds that are not counted here pass by."""
        if isinstance(report, Tick):
            self._tick(report)
        elif isinstance(report, ModelState) and report.state == "ready" and report.seconds:
            self._load.labels(report.model).set(report.seconds)

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

    def failed(self, model: str, reason: str) -> None:
        """An accepted request failed; reason: an error code."""
        self._failed.labels(model, reason).inc()

    def rejected(self, model: str, reason: str) -> None:
        """A request was refused; model: a card's id, or "" when it named none that exists; reason: an error code."""
        self._rejected.labels(model, reason).inc()

    def render(self, workers: Workers) -> bytes:
        """The exposition text. Gauges are set here, from what is true now."""
        for model, state in workers.states.items():
            in_flight = self._in_flight[model]
            running = min(in_flight, self._rows[model])
            self._running.labels(model).set(running)
            self._waiting.labels(model).set(in_flight - running)
            self._loaded.labels(model).set(state.state == "ready")
        self._restarted.inc(workers.restarts - self._restarts)
        self._restarts = workers.restarts
        return generate_latest(self.registry)

    def _tick(self, tick: Tick) -> None:
        self._phases[tick.phase].labels(tick.model).observe(tick.seconds)
        self._padding.labels(tick.model).inc(tick.padding)
        if tick.phase == "denoise":
            self._rows[tick.model] = tick.rows
            self._batch_rows.labels(tick.model).observe(tick.rows)
            self._batch_passes.labels(tick.model).observe(tick.passes - tick.padding)

    def _gauge(self, name: str, text: str) -> Gauge:
        return Gauge(f"instep_{name}", text, ["model"], registry=self.registry)

    def _counter(self, name: str, text: str, *labels: str) -> Counter:
        return Counter(f"instep_{name}", text, ["model", *labels], registry=self.registry)

    def _seconds(self, name: str, text: str) -> Histogram:
        return Histogram(f"instep_{name}", text, ["model"], registry=self.registry, buckets=SECONDS)

    def _counts(self, name: str, text: str) -> Histogram:
        return Histogram(f"instep_{name}", text, ["model"], registry=self.registry, buckets=COUNTS)
