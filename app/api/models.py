"""/v1/models and /v1/loras: cards as OpenAI's model objects, their classes, LoRAs; the admin loads and unloads."""

from collections.abc import Mapping
from typing import Annotated, Any, Literal

from fastapi import APIRouter, HTTPException, Query, Request
from pydantic import BaseModel, Field

from app.api.errors import ErrorReply
from app.api.front import Front, facts_of, front_of, key_of
from app.cards.adapters import Adapter
from app.cards.card import Card
from app.cards.catalog import fitting, search
from app.cards.folder import ModelFolder
from app.errors import NotDownloaded, Unavailable, plain
from app.jobs.body import most_steps_of
from app.jobs.schema import fields_schema
from app.report import ModelState
from app.samplers.table import valid_grids

router = APIRouter(prefix="/v1/models", tags=["models"])
loras = APIRouter(tags=["models"])
NOT_FOUND: dict[int | str, dict[str, Any]] = {
    404: {"model": ErrorReply, "description": "No model has this name, or none that this key may use"}
}
NO_WORKER: dict[int | str, dict[str, Any]] = {503: {"model": ErrorReply, "description": "No engine process is alive"}}
CLASS_LIMIT = 1000
SAME = {"id", "base", "aliases", "description", "family", "defaults", "limits", "license", "gated", "bytes"}
SAME |= {"parameters"}
"""Fields of an entry that are those of the card."""


class ModelEntry(BaseModel):
    """OpenAI's model object with fields of ours."""

    id: str
    object: Literal["model"] = "model"
    created: int = Field(description="When the card was last written, seconds since 1970")
    owned_by: str = "instep"
    base: str = Field(description="Of a variant: the model that it is with the LoRAs among its defaults; else empty")
    aliases: list[str]
    description: str
    family: str
    condition: Literal["prompt", "class_label"]
    classes: int
    state: Literal["absent", "loading", "ready", "failed"]
    detail: str
    device_bytes: int
    defaults: dict[str, Any]
    limits: dict[str, Any]
    samplers: list[str]
    schedules: dict[str, list[str]] = Field(description="Values of schedule that each sampler takes")
    loras: list[str] = Field([], description="Names of the LoRAs that fit it and that this key may use")
    refiners: list[str] = Field([], description="Models that can draw the last part of its pictures")
    most_steps: dict[str, int] = Field(description="The most num_inference_steps of each sampler")
    license: str
    gated: bool = Field(description="Whether its repository requires that you accept its terms")
    parameters: int | None = Field(description="Of the denoising network; null where the card does not say")
    bytes: int | None = Field(description="Of all weights as they are downloaded; null where the card does not say")
    downloaded: bool = Field(description="Whether all its files are on this machine")


class Model(ModelEntry):
    """A model alone, with what a request for it may ask for."""

    fields: dict[str, Any] = Field(
        description="JSON schemas of the fields of bodies for it, also of edits, in its bounds and with its defaults"
    )


class ModelList(BaseModel):
    """All models."""

    object: Literal["list"] = "list"
    data: list[ModelEntry]
    skipped: list[dict[Literal["card", "reason"], str]] = Field(
        description="Cards that are invalid, by file, for keys that may use every model: they are left out, or served "
        "as they were before a reload"
    )


class ClassEntry(BaseModel):
    """One class of a model of classes."""

    id: int
    name: str


class ClassList(BaseModel):
    """Classes that were found; empty for a model that draws prompts."""

    object: Literal["list"] = "list"
    data: list[ClassEntry]


@router.get("")
async def list_models(request: Request) -> ModelList:
    """Every model that this server can draw with, the default first."""
    front = front_of(request)
    cards = sorted(front.registry.cards.values(), key=lambda card: card.id != front.registry.default.id)
    found = await _entries(front, front.registry.all)
    skipped = [] if key_of(request).models else _skipped(front)
    return ModelList(data=[_fitted(front, card, found[card.id]) for card in cards], skipped=skipped)


@loras.get("/v1/loras", response_model_exclude={"data": {"__all__": {"file", "stamp"}}})
async def list_loras(request: Request) -> dict[Literal["data"], list[Adapter]]:
    """Every LoRA that this key may use. `fits` has the models that it can change, `problem` why it fits none."""
    return {"data": list(front_of(request).adapters.values())}


@router.get("/{model:path}/classes", responses=NOT_FOUND)
async def get_classes(
    request: Request, model: str, q: Annotated[str | None, Query(description="Part of a name, or an id")] = None
) -> ClassList:
    """Find classes of a model by part of the name, in any case, or by id; at most 1,000."""
    _, card = _found(request, model)
    return ClassList(data=[ClassEntry(id=index, name=name) for index, name in search(card, q)[:CLASS_LIMIT]])


@router.post("/{model:path}/load", status_code=202, responses=NOT_FOUND | NO_WORKER)
async def load_model(request: Request, model: str) -> ModelEntry:
    """Begin to load a model on every device. The answer has its state now; GET the model to see when it is ready."""
    return await _ordered(request, model, "load")


@router.post("/{model:path}/unload", status_code=202, responses=NOT_FOUND | NO_WORKER)
async def unload_model(request: Request, model: str) -> ModelEntry:
    """Take a model off every device, once its requests there are done. The next request for it loads it again."""
    return await _ordered(request, model, "unload")


# NOTE: the last of them: before the others it would take "a/load" for a name.
@router.get("/{model:path}", responses=NOT_FOUND)
async def get_model(request: Request, model: str) -> Model:
    """One model, by id or alias, which may have slashes; with the fields that a request for it may have."""
    front, card = _found(request, model)
    entry, registry = await _one(front, card), front.registry
    fields = fields_schema(card, registry.adapters or {}, entry.refiners)
    return Model(**entry.model_dump(), fields=fields)


async def _ordered(request: Request, name: str, order: Literal["load", "unload"]) -> ModelEntry:
    front, card = _found(request, name)
    if not front.supervisor.live:
        raise Unavailable("No engine process is alive.", retry_after=5.0, code="no_worker")
    front.supervisor.call(order, card.model)
    return await _one(front, card)


def _found(request: Request, name: str) -> tuple[Front, Card]:
    """NOTE: in a body an empty name is the default model, but /v1/models/ is no address."""
    front = front_of(request)
    if not name:
        raise HTTPException(404)
    card = front.registry.find(name)
    facts_of(request)["model"] = card.model
    return front, card


async def _entries(front: Front, cards: Mapping[str, Card]) -> dict[str, ModelEntry]:
    """The entry of each model, by id; a thread looks at the disk, once for all who wait for the same."""

    async def make() -> dict[str, ModelEntry]:
        states, every = front.supervisor.states, front.registry.all
        return await front.in_thread(
            lambda: {one: _entry(card, every, states.get(card.model)) for one, card in cards.items()}
        )

    return await front.shared(("models", *cards), make)


async def _one(front: Front, card: Card) -> ModelEntry:
    """The entry of one model alone: a slow disk under others does not delay it."""
    return _fitted(front, card, (await _entries(front, {card.id: card}))[card.id])


def _fitted(front: Front, card: Card, entry: ModelEntry) -> ModelEntry:
    """The entry with what depends on the key. NOTE: entries are shared by all who ask at once."""
    registry = front.registry
    hidden = card.refiner and card.refiner.model not in registry.cards.owners
    defaults = {name: value for name, value in entry.defaults.items() if not (hidden and name == "refiner")}
    found: dict[str, Any] = {
        "defaults": defaults,
        "loras": fitting(card, registry.adapters or {}),
        "refiners": registry.refiners(card),
    }
    return entry.model_copy(update=found)


def _skipped(front: Front) -> list[dict[Literal["card", "reason"], str]]:
    folder = front.settings.models
    return [
        {
            "card": plain(f"{file.parent.name}/{file.name}"),
            "reason": error.message.replace(f"{folder.resolve()}/", "").replace(f"{folder}/", ""),
        }
        for file, error in front.registry.all.skipped.items()
    ]


def _entry(card: Card, cards: Mapping[str, Card], state: ModelState | None) -> ModelEntry:
    state, fault = state or ModelState(card.id, "absent"), ModelFolder(card, cards).fault()
    broken = fault.message if fault and not isinstance(fault, NotDownloaded) else ""
    try:
        created = int((card.folder / "card.toml").stat().st_mtime)
    except OSError:
        created = 0
    facts = card.model_dump(include=SAME)
    own = {name: value for name, value in card.model_dump(include={"loras", "refiner"}).items() if value}
    return ModelEntry(
        **facts | {"defaults": facts["defaults"] | own},
        created=created,
        condition="class_label" if card.draws_classes else "prompt",
        classes=len(card.labels),
        state=state.state,
        detail=(state.detail or broken).replace(f"{card.folder.parent}/", ""),
        device_bytes=state.device_bytes,
        samplers=list(steps := most_steps_of(card)),
        most_steps=steps,
        schedules={sampler: list(valid_grids(sampler)) for sampler in steps},
        downloaded=fault is None,
    )
