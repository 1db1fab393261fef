"""Main: puts cards, workers, metrics and routes together, and serves them until a signal says stop."""

import asyncio
import errno
import gc
import math
import os
import resource
import signal
import socket
import sys
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager, suppress
from functools import partial
from types import FrameType
from typing import Any, cast

import uvicorn

from app import logs
from app.api import docs
from app.api.access import HEADER_BYTES
from app.api.app import Application, build, refuser
from app.api.front import Front
from app.api.guard import Door, Guarded
from app.api.reload import reload
from app.cards.cards import read_cards
from app.cards.catalog import Registry, warn_of
from app.errors import InstepError, SettingsError
from app.jobs.schema import first_curl, url_of
from app.keys import read_keys, with_ids
from app.metrics import Metrics, version
from app.settings import SECRETS, Settings
from app.worker.supervisor import Supervisor

LAST_ANSWERS = 5  # seconds, after the drain, in which the 503s to what did not finish may still go out
KEEP_ALIVE = 75  # seconds an idle connection is kept: over the 60 of common balancers, so that they close it, not we
SWITCH = 0.001  # seconds that a thread may compute while the event loop waits for the interpreter's lock, not 5 ms

WAITING = 2048  # connections that the system keeps for us until we accept them
ACCEPTED = 4  # connections accepted in one turn of the event loop: each has a file before the door has counted it
OTHER_FILES = 256  # besides the connections within the caps; half of all where there are fewer than twice as many
MOST_FILES = 1 << 20  # open files that are enough where connections have no cap, and the system has none either

NO_FILES = (errno.EMFILE, errno.ENFILE, errno.ENOBUFS, errno.ENOMEM)
"""Why a connection cannot be accepted though it is there. asyncio tries again after a second."""
QUIET = 60.0  # seconds between two lines of the log about that

Reread = Callable[[], Settings] | None
"""Reads the settings again, for a reload."""


def create_app(
    settings: Settings, *, reread: Reread = None, supervisor: Supervisor | None = None, metrics: Metrics | None = None
) -> Application:
    """The whole server as an ASGI application; its lifespan starts the engine processes and ends them.

    A card that cannot be served, and a model that cannot be loaded, are a line of the log each. supervisor, metrics:
    for tests that bring their own workers. Raises SettingsError.
    """
    registry = Registry(read_cards(settings.models, settings.alias), settings)
    keys = with_ids(read_keys(settings), registry)
    if settings.loras and settings.adapters and not settings.adapters.is_dir():
        raise SettingsError(f"loras: there is no folder {settings.loras}", param="loras")
    settings = settings.without_secrets()
    metrics = metrics or Metrics()
    supervisor = supervisor or Supervisor(settings, registry.all, observe=metrics.observe)
    front = Front(settings, registry, supervisor, metrics, keys, reread or (lambda: settings))
    warn_of(registry.all)

    @asynccontextmanager
    async def lifespan(app: Application) -> AsyncIterator[None]:
        try:
            await supervisor.start()
        except InstepError as error:
            app.state.refusal = error
            raise
        try:
            await docs.written(app, front)  # before there is anybody whom it could keep waiting
            if registry.adapters is None:
                app.state.learning = asyncio.ensure_future(reload(app))
            yield
        finally:
            await supervisor.stop(settings.drain)
            front.pool.shutdown(wait=False, cancel_futures=True)

    return build(front, lifespan, version())


def serve(settings: Settings, app: Application | None = None, *, reread: Reread = None) -> None:
    """Serve until SIGTERM or SIGINT, then drain and return; SIGHUP reloads. Call it on the main thread.

    app: made of these settings already, with workers of its own. Raises SettingsError, also when the port is taken,
    and the error with which an engine process refused to start.
    """
    logs.setup(settings.log_level)
    app = app or create_app(settings, reread=reread)
    room = make_room(settings.max_connections)
    settings = settings.without_secrets().model_copy(update={"max_connections": room})
    forget_secrets()
    listener = listen(settings.host, settings.port)
    # NOTE: uvicorn drains on a signal and then raises it again, which would end the process with a failure. By then
    # these handlers are back in place; before uvicorn takes over, they end the start just as quietly.
    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, lambda *_: sys.exit(0))
    with suppress(SystemExit):
        _Server(app, settings).run(sockets=[listener])
    refusal: InstepError | None = getattr(app.state, "refusal", None)
    if refusal:
        raise refusal


def configured(app: Application, settings: Settings) -> uvicorn.Config:
    """The configuration with which uvicorn serves this application, through our own guard."""
    return uvicorn.Config(
        app,
        port=settings.port,
        http=cast(Any, partial(Guarded, Door(settings, refuser(app)))),
        ws="none",
        h11_max_incomplete_event_size=HEADER_BYTES,
        lifespan="on",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=KEEP_ALIVE,
        timeout_graceful_shutdown=math.ceil(settings.drain) + LAST_ANSWERS + 1,
    )


def listen(host: str, port: int) -> socket.socket:
    """A bound socket. Raises SettingsError for an address that is taken, before anything heavy has started."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    # NOTE: with the protocol named asyncio switches Nagle off; else every answer after the first waits 40 ms for an ACK
    listener = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
    except OSError as error:
        listener.close()
        raise _taken(host, port, error) from error
    listener.set_inheritable(False)
    return listener


def make_room(connections: int) -> int:
    """Raise this process's limit of open files for so many connections, 0 for all that there can be.

    Returns how many connections fit, and logs a warning where that is fewer.
    """
    soft, hard = (
        sys.maxsize if limit == resource.RLIM_INFINITY else limit
        for limit in resource.getrlimit(resource.RLIMIT_NOFILE)
    )
    files = max(soft, min(hard, connections + OTHER_FILES if connections else MOST_FILES))
    if files > soft:
        resource.setrlimit(resource.RLIMIT_NOFILE, (files, hard if hard < sys.maxsize else resource.RLIM_INFINITY))
    room = files - min(OTHER_FILES, files // 2)
    if room < connections:
        logs.logger("instep").warning("fewer connections", wanted=connections, room=room, open_files=files)
    return min(room, connections or room)


def forget_secrets() -> None:
    """Take the keys out of this process's environment, which the engine processes inherit."""
    names = {f"{Settings.model_config.get('env_prefix')}{name}".upper() for name in SECRETS}
    for name in [name for name in os.environ if name.upper() in names]:
        del os.environ[name]


def greet(front: Front, host: str, port: int) -> None:
    """The last words of a start: a curl to paste and the address of the page, on a terminal; else a line of the log."""
    url, closed = url_of(host, port), bool(front.keys.clients)
    curl = first_curl(url, front.registry.default, key=closed)
    if not sys.stderr.isatty():
        logs.logger("instep").info("listening", url=url, address=f"{host}:{port}", curl=curl)
        return
    keys = ", with one of your keys in INSTEP_KEY" if closed else ""
    print(f"A first picture{keys}:\n{curl}\nInstep draws at {url}", file=sys.stderr, flush=True)


def few_words() -> Callable[[asyncio.AbstractEventLoop, dict[str, Any]], None]:
    """An exception handler for the event loop: connections that could not be accepted are one line a minute."""
    logged, count = -QUIET, 0

    def handle(loop: asyncio.AbstractEventLoop, context: dict[str, Any]) -> None:
        nonlocal logged, count
        error = context.get("exception")
        if not isinstance(error, OSError) or error.errno not in NO_FILES or "socket" not in context:
            loop.default_exception_handler(context)
            return
        count += 1
        if (now := time.monotonic()) >= logged + QUIET:
            logs.logger("instep").error("connections wait for open files", reason=error.strerror, failures=count)
            logged, count = now, 0

    return handle


class _Server(uvicorn.Server):
    """uvicorn with our drain: its own only waits, and past its limit it drops connections without an answer."""

    def __init__(self, app: Application, settings: Settings) -> None:
        self._front: Front = app.state.front
        self._reload = partial(reload, app)
        self._terminal = sys.stderr.isatty()
        self._settings = settings
        super().__init__(configured(app, settings))
        self.config.backlog = ACCEPTED

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal before anybody is served ends the start; a second one, if it is SIGINT, ends the drain."""
        if not self.started:
            raise SystemExit(0)
        super().handle_exit(sig, frame)
        if self.force_exit:
            asyncio.run_coroutine_threadsafe(self._hurry(), asyncio.get_running_loop())

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start, then log the address. Raises SettingsError if another has begun to listen there meanwhile."""
        loop = asyncio.get_running_loop()
        loop.set_exception_handler(few_words())
        loop.add_signal_handler(signal.SIGHUP, self._hang_up)
        try:
            await super().startup(sockets)
        except OSError as error:
            await self.lifespan.shutdown()
            raise _taken(self._settings.host, self._settings.port, error) from error
        # Threads take short turns, and a full pass of the garbage collector, which took 0.2 s, skips what is there now.
        sys.setswitchinterval(SWITCH)
        gc.collect()
        gc.freeze()
        for listener in sockets or [] if self.started else []:
            # NOTE: what asyncio accepts at once and what the system keeps for us are one number to uvicorn.
            listener.listen(WAITING)
            greet(self._front, *listener.getsockname()[:2])

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Stop accepting and drain at the same time, so that what runs past the drain is answered 503."""
        drain = self._front.settings.drain
        stopping = asyncio.ensure_future(self._front.supervisor.stop(drain))
        asyncio.get_running_loop().call_later(drain + LAST_ANSWERS, self._cut)
        await super().shutdown(sockets)
        await stopping

    def _hang_up(self) -> None:
        """Reload; but where the terminal that the server was started in is gone, end as without this handler."""
        if self._terminal and not sys.stderr.isatty():
            self.handle_exit(signal.SIGTERM, None)
        else:
            self._reloading = asyncio.ensure_future(self._reload())

    async def _hurry(self) -> None:
        """Answer what is not done with 503, and do not wait for engines either."""
        await self._front.supervisor.stop(0)
        await asyncio.sleep(0.1)
        self._cut()

    def _cut(self) -> None:
        """Abort what is still connected: uvicorn would cancel the routes, with a traceback for each."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def _taken(host: str, port: int, error: OSError) -> SettingsError:
    """The error for an address that the system does not give us."""
    return SettingsError(f"cannot listen on {host}, port {port}: {error.strerror or error}", param="port")
