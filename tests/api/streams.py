"""Reading streams of server-sent events in tests."""

from __future__ import annotations

import base64
import json
from collections.abc import Iterable, Iterator
from io import BytesIO
from typing import Any

import httpx
from PIL import Image

Event = dict[str, Any]


def events(text: str) -> list[Event]:
    """The data of each event of a whole stream; comments are left out, and names are those in the data."""
    return [*read(text.splitlines())]


def read(lines: Iterable[str]) -> Iterator[Event]:
    """The data of each event as its lines come."""
    name = None
    for line in lines:
        field, _, value = line.partition(": ")
        if field == "event":
            name = value
        elif field == "data":
            event = json.loads(value)
            assert event.get("type") == name, line
            yield event
            name = None


def kinds(found: Iterable[Event]) -> list[str]:
    """The last word of each event's type; of an error, its code."""
    return [event["error"]["code"] if "error" in event else event["type"].partition(".")[2] for event in found]


def pixel(event: Event) -> object:
    return Image.open(BytesIO(base64.b64decode(event["b64_json"]))).convert("RGB").getpixel((0, 0))


def batch(http: httpx.Client, *requests: Event, **options: Any) -> httpx.Response:
    return http.post("/v1/images/batch", json={"requests": [*requests]}, **options)


def of_each(found: Iterable[Event], requests: int) -> list[list[Event]]:
    """The events of each request of a batch."""
    by_request: list[list[Event]] = [[] for _ in range(requests)]
    for event in found:
        by_request[event["request_index"]].append(event)
    return by_request
