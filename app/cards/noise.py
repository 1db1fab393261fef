"""Noise: from a folder's scheduler_config.json to the `schedule` of a card.

The names are those of diffusers' schedulers. Keys of how a solver steps are ignored: that is a choice of a request.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from math import inf
from pathlib import Path
from typing import Any

from app.cards.files import read_json
from app.errors import CheckpointError
from app.samplers.schedule import Schedule

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
"""The classes whose noise process a card can hold; flow ones among the second say `use_flow_sigmas`."""

_WORDS = {
    "prediction_type": {"epsilon": "epsilon", "v_prediction": "v", "sample": "sample"},
    "beta_schedule": {word: word for word in ("linear", "scaled_linear")},
    "timestep_spacing": {word: word for word in ("leading", "linspace", "trailing")},
    "variance_type": {word: word for word in ("fixed_small", "fixed_large", "learned_range")},
}
"""The values that a table of coefficients can be made of, by diffusers' word and by a card's."""

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
"""Values that change nothing, besides none and false, of keys that no table of coefficients can hold."""

_SOLVERS = frozenset(
    (
        *("algorithm_type", "solver_order", "solver_type", "lower_order_final", "euler_at_final", "skip_prk_steps"),
        *("predict_x0", "solver_p", "disable_corrector", "noise_sampler_seed"),
        *("clip_sample_range", "sample_max_value", "dynamic_thresholding_ratio"),
    )
)
"""Keys of how a solver steps, or that act only with what is refused."""


def schedule_of(folder: Path, like: Mapping[str, Any]) -> dict[str, Any]:
    """A card's `schedule` for a diffusers folder: `like`, with each fact of the folder in its place.

    like: the `schedule` of the most similar card, as its TOML says it. Raises CheckpointError naming file and key:
    clipped samples, another kind of noise process, a key or a value that no table of coefficients can hold.
    """
    file, config = folder / FILE, check_schedule(folder)
    if config is None:
        return dict(like)
    name, flows = str(config.get("_class_name", "")), bool(config.get("use_flow_sigmas"))
    if name and name not in (*FLOW, *DIFFUSION):
        raise CheckpointError(f"{file}: {name} is not a scheduler that a card can say the noise of")
    kind = "flow" if name in FLOW or flows else "diffusion" if name else like["kind"]
    if kind != like["kind"]:
        raise CheckpointError(f"{file}: {name} is for a {kind} model, and such networks are of {like['kind']}")
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

    Raises CheckpointError for clipped or thresholded samples: they are not affine, so no table can hold them.
    """
    file = folder / FILE
    if not file.exists():
        return None
    config = read_json(file)
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
        words = _WORDS.get(key)
        if words is not None and value not in words:
            raise CheckpointError(f"{file}: {key} is {_word(value)}, which no schedule here has")
        made[field] = value if words is None else words[value]
    return made


def _word(value: object) -> str:
    """A value in a message, not longer than a line."""
    return (json.dumps(value) if isinstance(value, str | bool | None) else str(value))[:80]
