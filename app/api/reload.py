"""POST /v1/reload, and what SIGHUP does: cards, keys, LIVE settings and LoRAs are read again while requests run."""

import asyncio
import logging
import pickle
import sys
from asyncio.subprocess import PIPE
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TypeVar

from fastapi import APIRouter, FastAPI, Request
from pydantic import BaseModel, Field, TypeAdapter

from app.api.front import Front
from app.cards.adapters import Adapter
from app.cards.cards import Cards
from app.cards.catalog import Registry, faults, read_again
from app.errors import SettingsError, plain
from app.keys import read_keys, with_ids
from app.logs import logger
from app.settings import LIVE

T = TypeVar("T")

SURVEY = (sys.executable, "-m", "app.checkpoints.adapters")
"""Finds out which models the LoRAs of a folder fit: a pickle of (folder, cards) goes in, JSON comes out."""

SURVEY_SECONDS = 1800.0
"""The most that it may take: a disk of the network may never answer, and until then there is no other reload."""

router = APIRouter(tags=["server"])
log = logger("instep")


class Reloaded(BaseModel):
    """What a reload has changed."""

    added: list[str] = Field(description="Models that are new")
    changed: list[str] = Field(description="Models with another card; an open request has its own to its end")
    removed: list[str] = Field(description="Models that are gone for new requests")
    keys: bool = Field(description="Whether the API keys are others than before")
    loras: list[str] = Field(description="LoRAs that are new, gone or changed")
    settings: list[str] = Field(description=f"Which of {', '.join(LIVE)} have a new value")
    problems: list[dict[str, str]] = Field(description="What is invalid, or takes a restart, as file and reason")


@router.post("/v1/reload", response_model=Reloaded)
async def reload_server(request: Request) -> Reloaded:
    """Read the cards, the file of keys, the LoRAs, and the aliases, the default model and the log level of the file of
    CONFIG again. No request is dropped. What is invalid is one of `problems`. To read LoRAs takes some seconds."""
    return await reload(request.app)


async def reload(app: FastAPI) -> Reloaded:
    """Read everything again, off the event loop, and serve with it; who asks while it runs waits for the next run."""
    front: Front = app.state.front
    return await front.shared("reload", partial(_reload, app))


async def _reload(app: FastAPI) -> Reloaded:
    old: Front = app.state.front
    front, found = await old.in_thread(_read, old)
    app.state.front = front
    front.supervisor.reload(front.registry.all, front.settings.log_level)
    logging.getLogger().setLevel(front.settings.log_level.upper())
    if front.settings.adapters or front.registry.adapters != {}:
        await _learn(app, front, found)
    log.info("reloaded", **{name: value for name, value in found if value and name != "problems"})
    for problem in found.problems:
        log.error("not reloaded", **problem)
    for file, why in faults(app.state.front.registry):
        log.warning("has a fault", file=plain(str(file)), reason=why)
        found.problems.append({"file": plain(str(file)), "reason": why})
    return found


async def _learn(app: FastAPI, front: Front, found: Reloaded) -> None:
    """Serve with the LoRAs that are there now, and note what that changes."""
    before, folder, cards = front.registry.adapters or {}, front.settings.adapters, front.registry.all
    try:
        adapters = await surveyed(folder, cards) if folder else {}
    except (OSError, ValueError) as error:
        adapters = before
        found.problems.append({"file": plain(str(folder)), "reason": str(error) or f"not read in {SURVEY_SECONDS:g} s"})
    registry = Registry(cards, front.settings, adapters)
    app.state.front = replace(front, registry=registry, documents={}, _next={})
    front.supervisor.reload(registry.all, front.settings.log_level)
    found.loras.extend(sorted(n for n in before.keys() | adapters.keys() if before.get(n) != adapters.get(n)))


async def surveyed(folder: Path, cards: Cards) -> dict[str, Adapter]:
    """The LoRAs of a folder by name, each with the models that it fits, by a process of its own: that needs torch.

    Raises OSError and ValueError where the process fails, TimeoutError after SURVEY_SECONDS.
    """
    process = await asyncio.create_subprocess_exec(*SURVEY, stdin=PIPE, stdout=PIPE, stderr=PIPE)
    try:
        asked = process.communicate(pickle.dumps((folder.absolute(), cards.models)))
        made, said = await asyncio.wait_for(asked, SURVEY_SECONDS)
    finally:
        if process.returncode is None:
            process.kill()
    if process.returncode:
        why = said.decode(errors="replace").strip().rpartition("\n")[2]
        raise ValueError(f"the process that reads LoRAs ended with {process.returncode}: {why}")
    # NOTE: clients see what is wrong with a file, and need not know where it is.
    found = TypeAdapter(list[Adapter]).validate_json(made.replace(f"{folder.absolute()}/".encode(), b""))
    return {one.name: one.model_copy(update={"file": folder.absolute() / one.file}) for one in found}


def _read(old: Front) -> tuple[Front, Reloaded]:
    """The front with all that is valid now, and what that changed. It reads files."""
    problems: list[tuple[object, str]] = []

    def valid(make: Callable[[], T], before: T, file: object) -> T:
        try:
            return make()
        except SettingsError as error:
            problems.append((file, error.message))
            return before

    read = valid(lambda: old.reread().without_secrets(), old.settings, old.settings.config)
    others = (name for name, value in read if name not in LIVE and value != getattr(old.settings, name))
    problems += [(read.config, f"{name}: the new value takes a restart") for name in others]
    settings = old.settings.model_copy(update={name: getattr(read, name) for name in LIVE})
    known = old.registry.adapters
    again = partial(read_again, settings, old.registry.all)
    registry = valid(lambda: Registry(again(), settings, known), old.registry, settings.models)
    keys = valid(lambda: with_ids(read_keys(settings, old.keys), registry), old.keys, settings.api_keys_file)
    # A key that stays as it was may name a model that is gone: then that stays too.
    registry = valid(lambda: (with_ids(keys, registry), registry)[1], old.registry, settings.models)
    if registry is old.registry:
        settings = old.settings.model_copy(update={"log_level": settings.log_level})
    else:
        problems += [(file, error.message) for file, error in registry.all.skipped.items()]
    cards, before = registry.all, old.registry.all
    return replace(old, settings=settings, registry=registry, keys=keys, documents={}, _next={}), Reloaded(
        added=sorted(cards.keys() - before.keys()),
        changed=sorted(name for name in cards.keys() & before.keys() if cards[name] != before[name]),
        removed=sorted(before.keys() - cards.keys()),
        keys=keys != old.keys,
        loras=[],
        settings=[name for name in LIVE if getattr(settings, name) != getattr(old.settings, name)],
        problems=[{"file": plain(str(file)), "reason": why.removeprefix(f"{file}: ")} for file, why in problems],
    )
