"""Messages arrive as they were sent, over a real socketpair; a broken stream is told from an ended one."""

import asyncio
import pickle
import socket
import struct
import threading

import numpy as np
import pytest

from app.errors import SettingsError, Unavailable
from app.report import Announce, Failure, ModelState, Preview, Progress, Result, Tick, Timings
from app.settings import Settings
from app.worker import wire
from tests.parts.supervising import CARDS, request

ORDERS = [
    ("start", Settings(devices="cpu", max_wait=7.0), CARDS, "cpu"),
    ("submit", request("ünï 🍎", seeds=(1, 2**63))),
    ("cancel", "r1"),
    ("stop",),
]
NEWS = [
    wire.Hello(),
    Announce("idle", 30.0),
    Progress("r1", 0, 1, 4),
    Tick("fake", "denoise", 1, 2, 0, 16, 0.1, 1, 0),
    ModelState("fake", "ready", rates={"32x32": 0.1}),
]


@pytest.mark.parametrize("order", ORDERS, ids=["start", "submit", "cancel", "stop"])
def test_orders_arrive_equal(order):
    ours, theirs = (sock.makefile("rwb") for sock in socket.socketpair())
    with ours, theirs:
        wire.send(ours, order)
        assert wire.receive(theirs) == order


def over_asyncio(write) -> list[wire.Word]:
    """What the front hears while `write(stream)` runs in a thread and then closes. Raises what ended the stream."""

    async def hear_all():
        heard = []
        ours, theirs = socket.socketpair()
        reader, writer = await asyncio.open_unix_connection(sock=ours)

        def send_all():
            with theirs, theirs.makefile("wb") as stream:
                write(stream)

        thread = threading.Thread(target=send_all)
        thread.start()
        try:
            while (message := await asyncio.wait_for(wire.read(reader), 20)) is not None:
                heard.append(message)
            return heard
        finally:
            writer.transport.abort()
            thread.join()

    return asyncio.run(hear_all())


def test_news_arrive_equal_and_in_order():
    assert over_asyncio(lambda stream: [wire.send(stream, message) for message in NEWS]) == NEWS


def test_pictures_arrive_whole():
    """A 1024 x 1024 image and its latents: 4 MB, many socket buffers long."""
    pixels = np.random.default_rng(0).integers(0, 256, (1024, 1024, 3), np.uint8)
    latents = np.random.default_rng(1).standard_normal((16, 128, 128)).astype(np.float32)
    sent = Result("r1", 3, 7, pixels, Timings(0, 1, 2, 3, 4, 5), latents, ("cut",))
    result, preview = over_asyncio(
        lambda stream: [wire.send(stream, sent), wire.send(stream, Preview("r1", 0, 0, pixels[:5]))]
    )
    assert np.array_equal(result.pixels, pixels) and result.pixels.dtype == np.uint8
    assert np.array_equal(result.latents, latents) and result.latents.dtype == np.float32
    assert (result.timings, result.warnings, result.index) == (sent.timings, ("cut",), 3)
    assert np.array_equal(preview.pixels, pixels[:5])


@pytest.mark.parametrize("piece", [1, 7, 1000, 65_536, 65_537, 1 << 20])
def test_frames_in_any_pieces(piece):
    """Small frames, frames just around the size of the reader's buffer, and large ones, cut at every kind of place."""
    sizes = (0, 10, 65_000, 65_400, 65_500, 65_536, 66_000, 200_000, 3)
    sizes = sizes if piece > 10 else (0, 10, 3)
    sent = [("load", "x" * size) for size in sizes] + NEWS
    stream = b"".join(wire.pack(message) for message in sent)

    def write(file):
        for start in range(0, len(stream), piece):
            file.write(stream[start : start + piece])
            file.flush()

    assert over_asyncio(write) == sent


def test_errors_keep_class_and_fields():
    sent = Unavailable("gone", param="p", retry_after=2.5, code="no_worker")
    refusal, failure = over_asyncio(
        lambda stream: [wire.send(stream, wire.Hello(SettingsError("no"))), wire.send(stream, Failure("r", sent))]
    )
    assert type(refusal.error) is SettingsError
    assert type(failure.error) is Unavailable and failure.error.code == "no_worker"
    assert (failure.error.message, failure.error.param, failure.error.retry_after) == ("gone", "p", 2.5)


def test_end_in_the_middle_of_a_frame_is_the_end():
    frame = wire.pack(wire.Hello())
    for length in (0, 3, 8, len(frame) - 1):
        assert over_asyncio(lambda stream, length=length: stream.write(frame[:length])) == []
        ours, theirs = socket.socketpair()
        with theirs:
            with ours:
                ours.sendall(frame[:length])
            assert wire.receive(theirs.makefile("rb")) is None


@pytest.mark.parametrize(
    "stream",
    [struct.pack("!Q", wire.FRAME_CAP + 1) + b"x" * 64, struct.pack("!Q", 4) + b"oops"],
    ids=["over the cap", "no pickle"],
)
def test_a_broken_stream_is_an_error(stream):
    with pytest.raises(ValueError, match="a frame of"):
        over_asyncio(lambda file: file.write(stream))
    ours, theirs = socket.socketpair()
    with ours, theirs:
        ours.sendall(stream)
        with pytest.raises(ValueError, match="a frame of"):
            wire.receive(theirs.makefile("rb"))


def test_nothing_over_the_cap_is_sent(monkeypatch):
    monkeypatch.setattr(wire, "FRAME_CAP", 100)
    assert pickle.loads(wire.pack(wire.Hello())[8:]) == wire.Hello()
    with pytest.raises(ValueError, match="over the cap of 100"):
        wire.pack(("cancel", "x" * 200))
