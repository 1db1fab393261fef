"""The real worker with a Tracer in it: `traced_worker.py FOLDER FD PULSE PAGE`."""

from __future__ import annotations

import sys
import threading
from pathlib import Path

from app.worker import process
from tests.parts.tracing import Tracer, watch

if __name__ == "__main__":
    tracer = Tracer()
    tracer.install()
    threading.Thread(target=watch, args=(tracer, Path(sys.argv.pop(1))), daemon=True).start()
    process.main()
