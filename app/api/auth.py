"""Who may use this server: keys, decided before every route, and pages of other origins (CORS)."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import cast

from fastapi import Request
from starlette.datastructures import Headers, MutableHeaders
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import Response
from starlette.types import ASGIApp

from app.api.errors import error_response
from app.api.front import Front
from app.cards.catalog import Registry
from app.errors import InstepError, ModelNotFound, RequestError, SettingsError
from app.keys import NOBODY, ApiKey, Keyring

OPEN = frozenset({"/healthz", "/readyz", "/metrics"})
"""Routes that never need a key: probes and scrapers bring none."""

ADMIN = frozenset({"/v1/models/{model}/load", "/v1/models/{model}/unload"})
"""Routes that need the admin key, also on a server that is open to all."""

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


async def authorize(request: Request) -> None:
    """Put the request's key into its state: the dependency of the whole application. Raises RequestError.

    NOTE: it goes by the template of the route that was chosen, never by request.url, which is made from the Host
    header. A route without a template is none of the open ones.
    """
    front: Front = request.app.state.front
    path = getattr(request.scope.get("route"), "path_format", "")
    try:
        request.state.key = _key_for(path, front.keys, request)
    except InstepError as error:
        front.metrics.rejected("", error.code)
        raise


def with_ids(keys: Keyring, registry: Registry) -> Keyring:
    """The keys with their models by id, also where a card's alias was used. Raises SettingsError for unknown names."""
    clients = []
    for key in keys.clients:
        try:
            ids = frozenset(registry.find(name).id for name in key.models)
        except ModelNotFound as error:
            why = "".join(map(registry.all.reason, sorted(key.models)))
            message = f"keys.{key.name}.models: {error.message}{why}"
            raise SettingsError(message, param="api_keys_file") from None
        clients.append(replace(key, models=ids))
    return replace(keys, clients=tuple(clients))


class Cors(CORSMiddleware):
    """The layer around everything, so that a page may read a 401 and a 500 too. No cookies: a key is a header here.

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
        """Starlette's answer, with a refusal in our own envelope. A preflight needs no key."""
        response = super().preflight_response(request_headers)
        if response.status_code < 400:
            return response
        refusal = error_response(RequestError("CORS_ORIGINS of this server has no such origin.", code="not_allowed"))
        refusal.headers["Vary"] = response.headers["Vary"]
        return refusal

    def mark(self, response: Response, origin: str) -> None:
        """Add the headers for a page of this origin to an answer that no route gave; without an origin, none."""
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


def _key_for(path: str, keys: Keyring, request: Request) -> ApiKey:
    if path in OPEN:
        return NOBODY
    if path in ADMIN and keys.admin is None:
        raise RequestError(
            "This server has no admin key, so nobody may load and unload its models by hand.", code="not_allowed"
        )
    if path not in ADMIN and not keys.clients:
        return NOBODY
    key = keys.find(_token(request))
    if key is None:
        raise RequestError("This server does not know this key.", code="invalid_api_key")
    if path in ADMIN and key is not keys.admin:
        raise RequestError("This takes the admin key.", code="not_allowed")
    return key


def _token(request: Request) -> bytes:
    """The token of the one Authorization header. Raises RequestError: of two, a proxy may have checked the other."""
    given = [value for name, value in request.headers.raw if name == b"authorization"]
    scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    if scheme.lower() != b"bearer" or not token.strip():
        raise RequestError("This server wants a key: Authorization: Bearer <key>, once.", code="invalid_api_key")
    return token.strip()
