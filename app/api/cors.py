"""CORS: which pages of other origins may read this server's answers. A preflight needs no key.

Off without CORS_ORIGINS. Starlette's middleware decides; errors and refusals before a route carry the same headers.
"""

from __future__ import annotations

import re
from typing import cast

from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from app.api.responses import error_response
from app.errors import Forbidden, SettingsError

EXPOSED = (
    "Location",
    "Retry-After",
    "WWW-Authenticate",
    "X-Model",
    "X-Request-ID",
    "X-Seed",
    "X-Should-Retry",
    "X-Warning",
)
"""Headers of our answers that a page may read, besides those that every page may."""

_ORIGIN = re.compile(r"https?://([a-z0-9.-]+|\[[0-9a-f:]+\])(:[0-9]{1,5})?")


class Cors(CORSMiddleware):
    """The layer around everything, so that a 401 and a 500 may be read too. No cookies: a key is a header here.

    app: None for one that only marks answers.
    """

    def __init__(self, app: ASGIApp | None, origins: tuple[str, ...]) -> None:
        super().__init__(
            cast(ASGIApp, app),
            allow_origins=origins,
            allow_methods=["*"],
            allow_headers=["*"],
            allow_private_network=True,
            expose_headers=EXPOSED,
        )

    def preflight_response(self, request_headers: Headers) -> Response:
        """Starlette's, with a refusal in our own envelope."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        refusal = error_response(Forbidden("CORS_ORIGINS of this server has no such origin."))
        refusal.headers["Vary"] = response.headers["Vary"]
        return refusal

    def mark(self, response: Response, origin: str) -> None:
        """The headers for a page of this origin, on an answer that no route gave; nothing without one."""
        headers = MutableHeaders(raw=response.raw_headers)
        if origin:
            headers.update(self.simple_headers)
        if origin and not self.allow_all_origins and self.is_allowed_origin(origin):
            self.allow_explicit_origin(headers, origin)


def read_origins(setting: str) -> tuple[str, ...]:
    """The entries of CORS_ORIGINS. Raises SettingsError for one that no browser would send."""
    origins = tuple(filter(None, (part.strip() for part in setting.split(","))))
    for origin in origins:
        if origin not in ("*", "null") and not _ORIGIN.fullmatch(origin):
            wanted = 'an origin is scheme://host or scheme://host:port, in lower case and with nothing after it, or "*"'
            raise SettingsError(f'cors_origins: "{origin[:128]}": {wanted}', param="cors_origins")
    return origins
