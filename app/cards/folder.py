"""ModelFolder: the files of a card, and the one answer to whether they are here; the schedule that a folder names.

It opens no weights beyond their first bytes; of a Hub repository it sees what is in the local cache. Nothing in a
downloaded folder is trusted: names of parts cannot leave it, and class names are looked up in an allowlist
(`app/families/components.py`). The schedule comes from scheduler_config.json, in the words of diffusers'
schedulers. Keys of how a solver steps are ignored: that is a choice of a request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from typing import Any, get_args

from app.cards import files
from app.cards.card import Card, Source
from app.errors import CheckpointError, NotDownloaded
from app.samplers.schedule import Schedule

TOKENIZERS: dict[str, tuple[tuple[str, ...], ...]] = {
    "CLIPTokenizer": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "CLIPTokenizerFast": (("tokenizer.json",), ("vocab.json", "merges.txt")),
    "T5Tokenizer": (("tokenizer.json",),),
    "T5TokenizerFast": (("tokenizer.json",),),
}
"""The classes of tokenizers with the sets of files of which one is enough. Every other class is a network."""

WITHOUT: dict[str, dict[str, str]] = {
    "dit": {},
    "sd3": {
        "text_encoder": "it is zeros without: prompts are followed less well",
        "text_encoder_2": "it is zeros without: prompts are followed less well",
        "text_encoder_3": "it is zeros without: long prompts and written words are followed less well",
    },
    "flux": {
        "text_encoder": "it is zeros without: pictures keep less to the prompt's style",
        "text_encoder_2": "it is zeros without: prompts are hardly followed",
    },
    "unet": {},
}
"""The parts that a model of a family can do without, and what it loses."""

FILE = "scheduler/scheduler_config.json"

CLIPS_BY_DEFAULT = frozenset(
    f"{name}Scheduler" for name in ("DDIM", "DDIMInverse", "DDIMParallel", "DDPM", "DDPMParallel", "CogVideoXDDIM")
)
"""diffusers' classes that clip samples when their config does not say (besides those of other tasks)."""

FLOW = ("FlowMatchEulerDiscreteScheduler", "FlowMatchHeunDiscreteScheduler")
DIFFUSION = tuple(
    f"{name}Scheduler"
    for name in (
        *("DDIM", "DDIMParallel", "DDPM", "DDPMParallel", "PNDM", "DEISMultistep", "UniPCMultistep", "LMSDiscrete"),
        *("EulerDiscrete", "EulerAncestralDiscrete", "HeunDiscrete", "KDPM2Discrete", "KDPM2AncestralDiscrete"),
        *("DPMSolverMultistep", "DPMSolverSinglestep", "DPMSolverSDE"),
    )
)
"""The schedulers that a card can describe the noise of; a flow among the second has `use_flow_sigmas`."""

_FIELDS = {
    "num_train_timesteps": ("train_steps", 1000),
    "prediction_type": ("prediction", "epsilon"),
    "beta_schedule": ("betas", "linear"),
    "beta_start": ("beta_start", 1e-4),
    "beta_end": ("beta_end", 2e-2),
    "timestep_spacing": ("spacing", None),
    "variance_type": ("variance", None),
    "steps_offset": ("steps_offset", None),
    "set_alpha_to_one": ("set_alpha_to_one", None),
}
"""Field of a card's schedule for each key, and diffusers' value where the key is absent. None: the field of the card
that the files are like, because the grid that samplers walk is a choice, not what the network learned."""

_LINE = {"base_image_seq_len": 256, "max_image_seq_len": 4096, "base_shift": 0.5, "max_shift": 1.15}
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "lambda_min_clipped": (-inf,),
    "final_sigmas_type": ("zero",),
    "timestep_type": ("discrete",),
    "interpolation_type": ("linear",),
    "time_shift_type": ("exponential",),
}
"""Values that change nothing, besides none and false, of keys that no table of coefficients has a place for."""

_SOLVERS = frozenset(
    (
        *("algorithm_type", "solver_order", "solver_type", "lower_order_final", "euler_at_final", "skip_prk_steps"),
        *("predict_x0", "solver_p", "disable_corrector", "noise_sampler_seed"),
        *("clip_sample_range", "sample_max_value", "dynamic_thresholding_ratio"),
    )
)
"""Keys of how a solver steps, or that act only with what is refused."""


@dataclass(frozen=True, slots=True)
class Part:
    """One component of a model: its name in model_index.json, its class, its folder with links resolved.

    file: the file of the authors' own layout that has its weights, if they are not in the folder.
    """

    name: str
    class_name: str
    folder: Path
    file: Path | None = None

    @property
    def weights(self) -> Path:
        """The path to name in errors about its weights."""
        return self.file or self.folder

    def check(self) -> None:
        """Raises CheckpointError naming the first of its files that is missing or is no file of a checkpoint."""
        choices = TOKENIZERS.get(self.class_name, (("config.json",),))
        found = [names for names in choices if all((self.folder / name).exists() for name in names)]
        if not found:
            raise CheckpointError(f"{self.folder / choices[0][0]}: missing")
        for name in found[0]:
            files.refuse_foreign(self.folder / name, "json")
        if self.class_name in TOKENIZERS:
            # transformers chooses the files to open by name, among these.
            for file in (*self.folder.glob("*"), *(self.folder / "additional_chat_templates").glob("*")):
                if file.suffix in (".json", ".txt", ".model", ".jinja"):
                    files.refuse_endless(file)
        else:
            for file in files.weight_files(self.weights):
                files.refuse_foreign(file)


class ModelFolder:
    """The folder of model_index.json that a card names, with the parts that other cards share with it."""

    def __init__(self, card: Card, cards: Mapping[str, Card]) -> None:
        """cards: all of them by id, because `components` may name them."""
        self.card, self._cards = cards[card.model] if card.base else card, cards

    @property
    def path(self) -> Path:
        """The folder: beside the card, or in the Hub cache. Raises CheckpointError: there is none; NotDownloaded.

        A repository without a model_index.json counts as downloaded if it has a part that the index beside the card
        names and that the card does not take from another one.
        """
        source = self.card.source
        if source.repo is None:
            folder = (self.card.folder / (source.path or ".")).resolve()
            if not folder.is_dir():
                raise CheckpointError(f"{self.card.id}: the folder {folder} does not exist")
            return folder
        if index := files.cached_file(source.repo, source.revision):
            return index.parent.resolve()
        beside = self.card.folder / files.INDEX
        for part in files.read_classes(beside) if beside.is_file() else ():
            config = files.cached_file(source.repo, source.revision, f"{part}/config.json")
            if config and part not in self.card.components:
                return config.parents[1].resolve()
        raise NotDownloaded(f"{self.card.id}: not downloaded: run `instep models pull {self.card.id}`")

    @property
    def index_file(self) -> Path:
        """Its model_index.json: in the folder, or beside the card if the repository has none."""
        file, beside = self.path / files.INDEX, self.card.folder / files.INDEX
        return beside if self.card.source.repo and not file.exists() and beside.is_file() else file

    def beside(self) -> ModelFolder:
        """The same model as the configs beside its cards describe it: they are there before a download."""
        cards = (self.card, *(self._owner(name)[0].card for name in self.card.components))
        local = {
            one.id: one.model_copy(update={"source": Source(path=one.source.path or "."), "files": {}}) for one in cards
        }
        return ModelFolder(local[self.card.id], local)

    def here(self) -> bool:
        """Whether every file of every part is on this machine: configs, tokenizers, all shards, other cards' parts.

        It reads folders, so an event loop calls it in a thread.
        """
        return self.fault() is None

    def fault(self) -> CheckpointError | None:
        """The error that a load would raise for missing or broken files. It reads folders, as `here` does."""
        try:
            self.check()
        except CheckpointError as error:
            return error
        return None

    def check(self) -> list[Part]:
        """Return the parts if all files are here. Raises CheckpointError naming what is missing, NotDownloaded."""
        try:
            parts = self.parts()
            for part in parts:
                try:
                    part.check()
                except CheckpointError as error:
                    raise self._lacking(part, error) from error
            return parts
        except (OSError, ValueError, RuntimeError) as error:  # no access, an impossible name, a loop of links
            raise CheckpointError(f"{self.card.id}: its files cannot be read: {error}") from error

    def parts(self) -> list[Part]:
        """The parts that model_index.json and `components` name. Raises CheckpointError, NotDownloaded."""
        index = self.index_file
        parts = [*self.own(), *map(self._shared, self.card.components)]
        if not parts:
            raise CheckpointError(f"{index}: names no part of a model")
        if unknown := self.card.files.keys() - {part.name for part in parts}:
            raise CheckpointError(f"{index}: {min(unknown)}: missing, though the card's files name it")
        return parts

    def own(self) -> list[Part]:
        """The parts of its own index, without those that `components` names. Raises as `parts`."""
        folder = self.path
        found = files.read_classes(self.index_file).items()
        return [self._part(name, kind, folder) for name, kind in found if name not in self.card.components]

    def index(self) -> dict[str, Any]:
        """All of model_index.json, with other cards' entries for shared parts. Raises as `parts`."""
        found = files.read_json(self.index_file)
        for name in self.card.components:
            owner, part = self._owner(name)
            found[name] = files.read_json(owner.index_file).get(part)
        return found

    def _owner(self, name: str) -> tuple[ModelFolder, str]:
        """The folder that has a part, and the name of the part there."""
        if name not in self.card.components:
            return self, name
        owner, _, part = self.card.components[name].partition("/")
        return ModelFolder(self._cards[owner], self._cards), part

    def _shared(self, name: str) -> Part:
        owner, part = self._owner(name)
        try:
            index = owner.index_file
        except NotDownloaded as error:
            raise self._to_pull(name) from error
        class_name = files.read_classes(index).get(part)
        if class_name is None:
            raise CheckpointError(f"{index}: {part}: missing, though another card's components.{name} names it")
        return replace(owner._part(part, class_name, owner.path), name=name)

    def _part(self, name: str, class_name: str, folder: Path) -> Part:
        """Raises CheckpointError for a missing or pickled file of the card's `files`."""
        if name not in self.card.files:
            return Part(name, class_name, (folder / name).resolve())
        file = (self.card.folder / self.card.files[name]).resolve()
        if file.suffix in files.PICKLES:
            raise CheckpointError(f"{file}: only safetensors are loaded ({files.CONVERT})")
        if not file.exists() or file.is_dir():
            raise CheckpointError(f"{file}: missing, though the card's files.{name} names it")
        return Part(name, class_name, (folder / name).resolve(), file)

    def _lacking(self, part: Part, error: CheckpointError) -> CheckpointError:
        """NotDownloaded in place of the error of a part that a download brings."""
        owner, _ = self._owner(part.name)
        torch = any(path.suffix in files.PICKLES for path in part.folder.glob("*"))
        return error if owner.card.source.repo is None or part.file or torch else self._to_pull(part.name)

    def _to_pull(self, part: str) -> NotDownloaded:
        name = self.card.id
        return NotDownloaded(f"{name}: its {part} is not downloaded: run `instep models pull {name}`")


def schedule_of(folder: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """A card's `schedule` for a diffusers folder: `like`, with each fact of the folder in its place.

    like: the `schedule` of the most similar card, as in its TOML. Raises CheckpointError naming file and key:
    clipped samples, another kind of noise process, a key or a value that no table of coefficients has a place for.
    """
    file, config = folder / FILE, check_schedule(folder)
    if config is None:
        return dict(like)
    name, flows = str(config.get("_class_name", "")), bool(config.get("use_flow_sigmas"))
    if name and name not in (*FLOW, *DIFFUSION):
        raise CheckpointError(f"{file}: {name} is a scheduler that no card can describe the noise of")
    kind = "flow" if name in FLOW or flows else "diffusion" if name else like["kind"]
    if kind != like["kind"]:
        raise CheckpointError(f"{file}: {name} is for a {kind} model, but this network is a {like['kind']} model")
    _refuse_others(file, config)
    predicts = config.get("prediction_type", "epsilon")
    if flows and predicts != "flow_prediction":
        raise CheckpointError(f"{file}: prediction_type is {_word(predicts)}, which no flow has")
    return _flow(config, like) if kind == "flow" else _diffusion(file, config, like)


def changes(before: Schedule, after: Mapping[str, Any]) -> list[str]:
    """The differences of a schedule from the one before, a line each: "shift is 1.0, not 3.0"."""
    fresh = Schedule(**after)
    names = [name for name in Schedule.model_fields if getattr(fresh, name) != getattr(before, name)]
    return [f"{name} is {_word(getattr(fresh, name))}, not {_word(getattr(before, name))}" for name in names]


def check_schedule(folder: Path) -> dict[str, Any] | None:
    """Read scheduler_config.json, None where there is none.

    Raises CheckpointError for clipped or thresholded samples: they are not affine, so no table describes them.
    """
    file = folder / FILE
    if not file.exists():
        return None
    config = files.read_json(file)
    name = str(config.get("_class_name", ""))
    for field, default in (("clip_sample", name in CLIPS_BY_DEFAULT), ("thresholding", False)):
        if config.get(field, default):
            why = "" if field in config else f" (the default of {name})"
            raise CheckpointError(f"{file}: {field} is true{why}: clipped samples cannot be served")
    return config


def _refuse_others(file: Path, config: Mapping[str, Any]) -> None:
    """Refuse what would change the pictures and has no place in a card."""
    used = {*_FIELDS, *_LINE, *_SOLVERS, "shift", "flow_shift", "use_flow_sigmas", "use_dynamic_shifting"}
    for key, value in config.items():
        neutral = value is None or value is False or value in _NEUTRAL.get(key, ())
        if key[:1] != "_" and key not in used and not neutral:
            raise CheckpointError(f"{file}: {key} is {_word(value)}, which no schedule here has")


def _flow(config: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    rest = {name: value for name, value in like.items() if name not in ("shift", "dynamic_shift", "train_steps")}
    steps = {"train_steps": config.get("num_train_timesteps", 1000)}
    if not config.get("use_dynamic_shifting"):
        return {**rest, **steps, "shift": config.get("flow_shift", config.get("shift", 1.0))}
    base_tokens, max_tokens, base, most = (config.get(key, value) for key, value in _LINE.items())
    line = {"base_tokens": base_tokens, "max_tokens": max_tokens, "base": base, "max": most}
    return {**rest, **steps, "dynamic_shift": line}


def _diffusion(file: Path, config: Mapping[str, Any], like: Mapping[str, Any]) -> dict[str, Any]:
    made = dict(like)
    for key, (field, absent) in _FIELDS.items():
        value = config.get(key, absent)
        if value is None:
            continue
        word, words = "v" if value == "v_prediction" else value, get_args(Schedule.model_fields[field].annotation)
        if words and word not in words:
            raise CheckpointError(f"{file}: {key} is {_word(value)}, which no schedule here has")
        made[field] = word
    return made


def _word(value: object) -> str:
    """A value in a message, not longer than a line."""
    return (json.dumps(value) if isinstance(value, str | bool | None) else str(value))[:80]
