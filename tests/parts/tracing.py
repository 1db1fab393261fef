"""What one prompt passes: the files of app/ in which a function ran, and the classes whose instances crossed a file.

A Tracer is installed before any thread of its process starts, because profile functions belong to a thread.
"""

from __future__ import annotations

import gc
import json
import sys
import threading
import time
from collections.abc import Iterable
from pathlib import Path
from types import FrameType
from typing import Any

APP = str(Path(__file__).parent.parent.parent / "app") + "/"


class Tracer:
    """Notes what runs between start() and stop().

    files: of app/ in which a function ran. classes: dotted names of app/'s classes, where one file gave an instance to
    another as an argument or as a result, alone or in a list, tuple or dict. What was there before the start (the card,
    the engine, its batcher) is not counted, nor is the object that a method is called on.
    """

    def __init__(self) -> None:
        self.on = False
        self.files: set[str] = set()
        self.classes: set[str] = set()
        self._old: dict[int, object] = {}

    def start(self) -> None:
        gc.unfreeze()  # what is frozen is not among the collector's objects
        self._old = {id(one): one for one in gc.get_objects() if of_app(type(one))}  # held, so that no id is used again
        self.on = True

    def stop(self) -> None:
        self.on = False
        self._old = {}

    def install(self) -> None:
        threading.setprofile(self._see)
        sys.setprofile(self._see)

    def remove(self) -> None:
        self.stop()
        threading.setprofile(None)
        sys.setprofile(None)

    def _see(self, frame: FrameType, event: str, value: Any) -> None:
        code = frame.f_code
        if not self.on or not code.co_filename.startswith(APP) or code.co_name == "<module>":
            return
        if event == "call":
            self.files.add(code.co_filename.removeprefix(APP))
            names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
            self._cross(frame, (frame.f_locals.get(name) for name in names if name not in ("self", "cls")))
        elif event == "return" and value is not None:
            self._cross(frame, [value])

    def _cross(self, frame: FrameType, values: Iterable[Any]) -> None:
        if caller(frame) == frame.f_code.co_filename:
            return
        for value in values:
            self.classes.update(
                name for one in inner(value) if (name := of_app(type(one))) and id(one) not in self._old
            )


def caller(frame: FrameType) -> str | None:
    """The file of app/ from which this frame was called, through libraries if need be; None when a library began it."""
    above = frame.f_back
    while above is not None and not above.f_code.co_filename.startswith(APP):
        above = above.f_back
    return above.f_code.co_filename if above is not None else None


def inner(value: Any) -> list[Any]:
    if isinstance(value, dict):
        return [*value, *value.values()][:20]
    return list(value)[:20] if isinstance(value, list | tuple) and type(value) in (list, tuple) else [value]


def of_app(kind: type) -> str | None:
    module = getattr(kind, "__module__", None)
    return f"{module}.{kind.__qualname__}" if isinstance(module, str) and module.startswith("app.") else None


def watch(tracer: Tracer, folder: Path) -> None:
    """In a child: trace while folder/on exists, from folder/traced on, then write folder/child.json."""
    while not (folder / "on").exists():
        time.sleep(0.01)
    tracer.start()
    (folder / "traced").touch()
    while (folder / "on").exists():
        time.sleep(0.01)
    tracer.stop()
    found = {"files": sorted(tracer.files), "classes": sorted(tracer.classes)}
    (folder / "part").write_text(json.dumps(found), encoding="utf-8")
    (folder / "part").rename(folder / "child.json")
