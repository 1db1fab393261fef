"""A survey of LoRAs without torch: the same pickle comes in and the same JSON goes out as of app.checkpoints.adapters.

A file is TOML with the fields of an Adapter; `fits` names models. INSTEP_FAKE_SURVEY: a file that it waits for.
"""

from __future__ import annotations

import os
import pickle
import sys
import time
import tomllib

from pydantic import TypeAdapter

from app.cards.adapters import Adapter, Fit


def main() -> None:
    folder, cards = pickle.load(sys.stdin.buffer)
    while not os.path.exists(os.environ.get("INSTEP_FAKE_SURVEY", "/")):
        time.sleep(0.01)
    found = []
    for file in sorted(folder.glob("*.safetensors")):
        facts = tomllib.loads(file.read_text(encoding="utf-8"))
        fit = Fit(rank=4, modules=6, parts=("transformer",), bytes=1234, unmatched=tuple(facts.pop("unmatched", ())))
        fits = {model: fit for model in facts.pop("fits", ()) if model in cards}
        problem = facts.pop("problem", "" if fits else "fits no model here")
        stamp = (file.stat().st_mtime_ns,)
        why = f"{file}: {problem}" if problem else ""
        found.append(Adapter(name=file.stem, file=file, stamp=stamp, fits=fits, problem=why, **facts))
    sys.stdout.buffer.write(TypeAdapter(list[Adapter]).dump_json(found))


if __name__ == "__main__":
    main()
