"""The process around the engine: orders in, reports out, signals, and its end; on a stand-in engine without torch."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import contextmanager

import pytest
import torch

from app.errors import SettingsError
from app.pool.budget import use_threads
from app.report import Announce, Failure, Progress, Tick
from app.settings import Settings
from app.worker import process, wire
from tests.parts.supervising import CARDS, request

STAND_IN = """
import ctypes, queue, sys, time
from app.errors import EngineError, SettingsError
from app.report import Announce, Failure, Progress, Tick
from app.worker import process

class Pool:
    def want(self, model): said.put(Announce("want " + model, 1.0))
    def close(self): said.put(Announce("closed", 1.0))

class Engine:
    def submit(self, request):
        what = request.delivery
        said.put(Failure(request.id, EngineError(f"submitted {what.arrived} {sorted(what.done)} {what.apart}")))
    def cancel(self, request_id): said.put(Failure(request_id, EngineError("cancelled")))
    def load(self, model_id): said.put(Announce("load " + model_id, 1.0))
    def unload(self, model_id): said.put(Announce("unload " + model_id, 1.0))
    def stop(self): said.put(Announce("stop", 1.0)); orders.put(None)
    def run(self): RUN

orders = queue.SimpleQueue()

class Said:
    def put(self, report): emit(report)

said = Said()

def build(settings, cards, device, tell, page):
    global emit
    emit = tell
    page.loads("this page")
    BUILD
    return Pool(), Engine()

process.build = build
process.main()
"""
WAITING, SLEEPING = "orders.get()", "ctypes.CDLL(None).sleep(600)"


@contextmanager
def child(run: str = WAITING, build: str = "", page: wire.Page | None = None, **settings: object):
    """The process, started as the supervisor starts it, and our end of its stream."""
    page = page or wire.Page()
    code = STAND_IN.replace("RUN", run).replace("BUILD", build or "pass")
    ours, theirs = socket.socketpair()
    beats, pulse = os.pipe()
    with theirs:
        fds = theirs.fileno(), pulse, page.descriptor
        words = [sys.executable, "-c", code, *map(str, fds)]
        running = subprocess.Popen(words, pass_fds=fds, stderr=subprocess.PIPE)
    os.close(pulse)
    ours.settimeout(20)
    stream = ours.makefile("rwb")
    ours.close()  # once the stream is closed too
    try:
        wire.send(stream, ("start", Settings(**({"devices": "cpu"} | settings)), CARDS, "cpu"))
        yield running, stream
    finally:
        page.close()
        stream.close()
        os.close(beats)
        running.kill()
        running.communicate()


def test_hello_comes_first_then_orders_reach_the_engine_and_stop_ends_it():
    with child(preload="other") as (running, stream):
        assert wire.receive(stream) == wire.Hello()
        assert wire.receive(stream) == Announce("want other", 1.0)
        asked = request(arrived=2.5, done=frozenset({1, 3}), apart=((0, -1),))
        for call in (("submit", asked), ("cancel", "r9"), ("load", "fake"), ("unload", "other"), ("stop",)):
            wire.send(stream, call)
        heard = []
        while (news := wire.receive(stream)) is not None:
            heard.append(news)
        assert [(news.request_id, news.error.message) for news in heard if isinstance(news, Failure)] == [
            (asked.id, "submitted 2.5 [1, 3] ((0, -1),)"),
            ("r9", "cancelled"),
        ]
        assert [news.phase for news in heard if isinstance(news, Announce)] == [
            "load fake",
            "unload other",
            "stop",
            "closed",
        ]
        assert running.wait(20) == 0


def test_the_engine_writes_on_the_page_that_the_front_made():
    page = wire.Page()
    with child(page=page) as (_, stream):
        assert wire.receive(stream) == wire.Hello()
        assert page.read() == ([], {"this page"})


@pytest.mark.parametrize("run", [WAITING, SLEEPING], ids=["waiting", "deep in native code"])
def test_the_end_of_the_stream_ends_the_process(run):
    with child(run) as (running, stream):
        assert isinstance(wire.receive(stream), wire.Hello)
        stream.close()
        assert running.wait(20) == 0


def test_the_end_of_the_stream_ends_a_process_that_still_builds():
    with child(build="time.sleep(600)") as (running, stream):
        stream.close()
        assert running.wait(20) == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_to_the_whole_group_are_left_to_the_front(number):
    with child(SLEEPING) as (running, stream):
        assert isinstance(wire.receive(stream), wire.Hello)
        running.send_signal(number)
        wire.send(stream, ("load", "fake"))
        assert wire.receive(stream) == Announce("load fake", 1.0)
        assert running.poll() is None
        stream.close()
        assert running.wait(20) == 0


def test_a_device_that_is_not_there_is_refused():
    with child(build="raise SettingsError('no such GPU')") as (running, stream):
        refusal = wire.receive(stream)
        assert isinstance(refusal, wire.Hello) and isinstance(refusal.error, SettingsError)
        assert running.wait(20) == 1


def test_an_engine_that_raises_ends_the_process():
    with child("time.sleep(0.1); raise RuntimeError('device lost')") as (running, _):
        assert running.wait(20) == 1
        assert b"device lost" in running.stderr.read()


def test_an_order_that_cannot_be_read_ends_the_process():
    with child() as (running, stream):
        assert isinstance(wire.receive(stream), wire.Hello)
        stream.write(bytes(7) + b"\x04oops")
        stream.flush()
        assert running.wait(20) == 1


@pytest.mark.parametrize(
    ("flags", "dtype"),
    [("fpu avx2", torch.float32), ("avx512f avx512_bf16", torch.bfloat16), ("amx_bf16 amx_tile", torch.bfloat16)],
)
def test_dtype_auto_is_what_the_processor_computes_in(tmp_path, flags, dtype):
    info = tmp_path / "cpuinfo"
    info.write_text(f"processor : 0\nflags : {flags}\n")
    assert process.resolve_dtype(Settings(), "cpu", info) is dtype
    assert process.resolve_dtype(Settings(dtype="bfloat16"), "cpu", info) is torch.bfloat16
    assert process.resolve_dtype(Settings(dtype="float32"), "cpu", info) is torch.float32
    assert process.resolve_dtype(Settings(), "cpu", tmp_path / "absent") is torch.float32


def test_a_gpu_that_is_not_there(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(SettingsError, match="torch sees no GPU"):
        process.build(Settings(), CARDS, "cuda:0", print)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    with pytest.raises(SettingsError, match="there are 2 GPUs"):
        process.build(Settings(), CARDS, "cuda:2", print)


def test_big_pictures_do_not_block_the_engine():
    """emit only queues: with nobody reading, the engine goes on; with a reader, all arrives in order."""
    run = "[emit(Announce('x' * 1_000_000, i)) for i in range(20)]; emit(Announce('end', 0.0))"
    with child(run) as (running, stream):
        time.sleep(0.2)
        assert isinstance(wire.receive(stream), wire.Hello)
        assert [wire.receive(stream).seconds for _ in range(20)] == list(range(20))
        assert wire.receive(stream) == Announce("end", 0.0)
        assert wire.receive(stream) == Announce("closed", 1.0)
        assert running.wait(20) == 0


def test_the_engines_threads_stay_when_another_thread_asks_for_fewer():
    """As the loader does, before the engine's thread has computed anything."""
    before, seen = torch.get_num_threads(), []

    def engine():
        use_threads(3)
        loader = threading.Thread(target=torch.set_num_threads, args=(1,))
        loader.start()
        loader.join()
        seen.append(torch.get_num_threads())

    thread = threading.Thread(target=engine)
    thread.start()
    thread.join()
    torch.set_num_threads(before)
    assert seen == [3]


def tick(number: int) -> Tick:
    return Tick("m", "denoise", 1, 1, 0, 1, 0.01 * number, 1, 0)


def test_ticks_go_together_and_nothing_else_waits():
    now, sent, step = [0.0], [], Progress("a", 0, 1, 4)
    sender = process.Sender(lambda *words: sent.append(words), clock=lambda: now[0])
    words = [(tick(number), 0.05 * number) for number in range(41)]  # 20 a second
    for word, now[0] in [*words, (step, 2.01), (step, 2.02), (tick(41), 2.03)]:
        sender.emit(word)
    sender.finish()
    *early, with_step, alone, rest = sent
    assert max(map(len, early)) * 0.05 <= process.HOLD + 0.001
    assert len(early[0]) == 1 and len(early) <= 2 / process.HOLD + 1
    assert with_step[-1] is step and alone == (step,) and rest == (tick(41),)
    assert [word for words in sent for word in words if word is not step] == [tick(number) for number in range(42)]


def test_every_tick_arrives_also_those_that_are_held_when_the_engine_ends():
    run = (
        "[said.put(Tick('m', 'denoise', 1, 1, 0, 1, 0.01 * n, 1, 0)) for n in range(20)]; "
        "said.put(Announce('on', 1.0)); [said.put(Tick('m', 'denoise', 1, 1, 0, 1, 0.01 * n, 1, 0)) "
        "for n in range(20, 42)]"
    )
    with child(run, "from app.report import Tick; globals()['Tick'] = Tick") as (_, stream):
        words = list(iter(lambda: wire.receive(stream), None))
    ticks = [word for word in words if isinstance(word, Tick)]
    assert ticks == [tick(number) for number in range(42)]
    assert words.index(Announce("on", 1.0)) < words.index(ticks[20])
