"""Security: which key a request brings and whether its route takes it: default deny, decided before every route.

Knows nothing of what the routes do.
"""

from __future__ import annotations

from dataclasses import replace

from fastapi import Request

from app.api.front import Front, record_of
from app.cards.catalog import Registry
from app.errors import Forbidden, InstepError, ModelNotFound, SettingsError, Unauthorized
from app.keys import NOBODY, ApiKey, Keyring

OPEN = frozenset({"/healthz", "/readyz", "/metrics"})
"""Routes that never need a key: probes and scrapers bring none."""

ADMIN = frozenset({"/v1/models/{model}/load", "/v1/models/{model}/unload"})
"""Routes that need the admin key, also on a server that is open to all."""


async def authorize(request: Request) -> None:
    """The dependency of the whole application: the request's key goes into its record.

    NOTE: it goes by the template of the route that was chosen, never by request.url, which is made from the Host
    header. A route that has no template is none of the open ones. Raises Unauthorized, Forbidden.
    """
    front: Front = request.app.state.front
    path = getattr(request.scope.get("route"), "path_format", "")
    try:
        record_of(request).key = _key_for(path, front.keys, request)
    except InstepError as error:
        front.metrics.rejected("", error.code)
        raise


def with_ids(keys: Keyring, registry: Registry) -> Keyring:
    """The keys, their models by id where a card's alias was given. Raises SettingsError for a name that no card has."""
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


def _key_for(path: str, keys: Keyring, request: Request) -> ApiKey:
    if path in OPEN:
        return NOBODY
    if path in ADMIN and keys.admin is None:
        raise Forbidden("This server has no admin key, so nobody may load and unload its models by hand.")
    if path not in ADMIN and not keys.clients:
        return NOBODY
    key = keys.find(_token(request))
    if key is None:
        raise Unauthorized("This server does not know this key.")
    if path in ADMIN and key is not keys.admin:
        raise Forbidden("This takes the admin key.")
    return key


def _token(request: Request) -> bytes:
    """What the one Authorization header brings. Raises Unauthorized: of two, a proxy may have checked the other."""
    given = [value for name, value in request.headers.raw if name == b"authorization"]
    scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    if scheme.lower() != b"bearer" or not token.strip():
        raise Unauthorized("This server wants a key: Authorization: Bearer <key>, once.")
    return token.strip()
