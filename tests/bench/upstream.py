"""diffusers' own pipeline around the parts of a loaded family: the baseline that a bench compares with."""

from __future__ import annotations

import copy
from typing import Any

import diffusers
import numpy as np
import torch

from app.bench.serve import SAMPLERS
from app.errors import InvalidValue
from app.families.base import Family
from app.families.flux import pack
from app.request import ClassLabel, Condition, ImageSpec, Prompt, Request
from app.samplers.schedule import Schedule
from tests.parts.requests import changed

_UNTYPED: Any = diffusers

SCHEDULERS: dict[str, Any] = {
    "ddim": diffusers.DDIMScheduler,
    "ddpm": diffusers.DDPMScheduler,
    "euler": diffusers.EulerDiscreteScheduler,
    "euler_ancestral": diffusers.EulerAncestralDiscreteScheduler,
    "heun": diffusers.HeunDiscreteScheduler,
    "dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
    "dpmpp_2m_sde": diffusers.DPMSolverMultistepScheduler,
    "lcm": diffusers.LCMScheduler,
    "flow_euler": diffusers.FlowMatchEulerDiscreteScheduler,
    "flow_heun": diffusers.FlowMatchHeunDiscreteScheduler,
    "flow_dpmpp_2m": diffusers.DPMSolverMultistepScheduler,
}
"""diffusers' class for each sampler of a request but flow_dpmpp_2m_sd3, which it does not have."""

SPACINGS = {"respaced": "linspace"}
"""diffusers' name where it is not the card's; its linspace is within one timestep of the original DiT's."""

PREDICTIONS = {"epsilon": "epsilon", "v": "v_prediction", "sample": "sample"}
NULL_CLASS = 1000
"""What DiTPipeline guides away from, whatever the network."""


class Upstream:
    """The pipeline of a loaded family, as a user of diffusers would run it: one image a call.

    The weights are the family's own, on its device; copies where the number format differs. What an absent text
    encoder would give comes from the family, because the pipelines cannot do without one.
    """

    def __init__(self, family: Family, *, dtype: torch.dtype | None = None, compiled: bool = False) -> None:
        """dtype: of all parts, the VAE too; None for the family's. compiled: torch.compile of the whole network.

        The family's weights must be on the device. Raises InvalidValue: a number of classes that DiTPipeline has not.
        """
        self.family = family
        self._dtype = dtype or family.dtype
        with torch.inference_mode():
            self.pipeline = _PIPELINES[family.card.family](family, self._dtype)
        # The card says how far CLIP's text is padded; the pipelines pad to what the tokenizer says.
        self.pipeline.tokenizer_max_length = family.card.text.clip
        self.pipeline.set_progress_bar_config(disable=True)
        if compiled:
            # NOTE: of a copy of the module, for the engine runs the family's own; the tensors stay the same.
            network = _copied(getattr(self.pipeline, family.card.network))
            setattr(self.pipeline, family.card.network, network)
            network.compile()

    @torch.inference_mode()
    def draw(self, request: Request, index: int = 0) -> np.ndarray:
        """Image `index` of the request, uint8 [H, W, 3]; the noise is that of its seed, drawn in float32 on the CPU.

        NOTE: DiTPipeline draws its first noise in its own number format, drops a learned variance, and with "ddpm"
        takes step noise from torch's global generator: its pictures are then others. Raises InvalidValue: a sampler
        that the pipeline does not draw with.
        """
        card, image = self.family.card, request.images[index]
        if request.recipe.sampler not in SAMPLERS[card.family]:
            known = ", ".join(SAMPLERS[card.family])
            raise InvalidValue(f"sampler: diffusers draws {card.id} with {known}", param="sampler")
        self.pipeline.scheduler = scheduler_of(card.schedule, request.recipe.sampler)
        call = _dit_call if card.draws_classes else self._text_call
        return np.asarray((self.pipeline(**call(request, image), output_type="np").images[0] * 255).round(), np.uint8)

    def _text_call(self, request: Request, image: ImageSpec) -> dict[str, Any]:
        """The arguments of the pipelines of prompts."""
        shape = self.family.latent_shape(request.recipe.width, request.recipe.height)
        dice = torch.Generator("cpu").manual_seed(image.seed)
        noise = torch.randn((1, *shape), generator=dice).to(self.family.device, self._dtype)
        guidance = request.recipe.guidance.scale if request.recipe.guidance.guided else 1.0
        if self.family.card.network == "unet":
            scales = {"guidance_scale": guidance, "generator": dice}
        elif self.family.card.family == "flux":
            noise = pack(noise)
            scales = {"true_cfg_scale": guidance, "guidance_scale": request.recipe.guidance.embedded or 0.0}
        else:
            scales = {"guidance_scale": guidance, **self._skipping(request)}
        return {
            **self._text(request, image.condition),
            **scales,
            "latents": noise,
            "width": request.recipe.width,
            "height": request.recipe.height,
            "num_inference_steps": request.recipe.steps,
            **({"max_sequence_length": request.recipe.text_length} if self.family.card.has("t5") else {}),
        }

    def _skipping(self, request: Request) -> dict[str, Any]:
        facts, skip = self.family.card.skip_layer_guidance, request.recipe.guidance.skip
        if facts is None or skip is None or not skip.scale:
            return {}
        words = {"scale": skip.scale, "start": skip.start, "stop": skip.stop}
        named = {f"skip_layer_guidance_{name}": value for name, value in words.items()}
        return {"skip_guidance_layers": list(facts.layers), **named}

    def _text(self, request: Request, condition: Condition) -> dict[str, Any]:
        """Prompt and negative prompt, or their embeddings where the pipeline misses an encoder."""
        assert isinstance(condition, Prompt)
        parts = self.pipeline.components
        if all(value is not None for name, value in parts.items() if name.startswith("text_encoder")):
            return {"prompt": condition.text, "negative_prompt": condition.negative}
        given = {}
        both = self.family.passes(condition, changed(request, guidance=2.0).recipe)
        for prefix, one in zip(("", "negative_"), both, strict=True):
            encoded = self.family.encode([one], request.recipe.text_length)
            given[f"{prefix}prompt_embeds"] = encoded["text"].to(self._dtype)
            if "pooled" in encoded:
                given[f"{prefix}pooled_prompt_embeds"] = encoded["pooled"].to(self._dtype)
        return given


def scheduler_of(schedule: Schedule, sampler: str) -> Any:
    """diffusers' scheduler for a card's schedule."""
    if schedule.kind == "diffusion":
        own: dict[str, dict[str, Any]] = {
            "ddim": {"clip_sample": False, "set_alpha_to_one": schedule.set_alpha_to_one},
            # DiTPipeline drops the channels of a learned variance before its scheduler sees them.
            "ddpm": {"clip_sample": False, "variance_type": schedule.variance.replace("learned_range", "fixed_small")},
            "dpmpp_2m_sde": {"algorithm_type": "sde-dpmsolver++"},
        }
        return SCHEDULERS[sampler](
            num_train_timesteps=schedule.train_steps,
            beta_start=schedule.beta_start,
            beta_end=schedule.beta_end,
            beta_schedule=schedule.betas,
            prediction_type=PREDICTIONS[schedule.prediction],
            timestep_spacing=SPACINGS.get(schedule.spacing, schedule.spacing),
            steps_offset=schedule.steps_offset,
            **own.get(sampler, {}),
        )
    # NOTE: FluxPipeline always gives a mu, which the multistep takes as a dynamic shift only; a static one is flat.
    line, multistep = schedule.dynamic_shift, sampler == "flow_dpmpp_2m"
    dynamic = line is not None or (multistep and schedule.spacing == "flux")
    options: dict[str, Any] = {"num_train_timesteps": schedule.train_steps}
    if multistep:
        options |= {"prediction_type": "flow_prediction", "use_flow_sigmas": True, "flow_shift": schedule.shift}
    else:
        options |= {"shift": schedule.shift}
    made = SCHEDULERS[sampler](**options, **({"use_dynamic_shifting": True} if dynamic else {}))
    if line is not None:
        names = {"base_image_seq_len": line.base_tokens, "max_image_seq_len": line.max_tokens}
        made.register_to_config(**names, base_shift=line.base, max_shift=line.max)
    elif dynamic:
        made.register_to_config(base_shift=float(np.log(schedule.shift)), max_shift=float(np.log(schedule.shift)))
    return made


def _dit_call(request: Request, image: ImageSpec) -> dict[str, Any]:
    """The arguments of DiTPipeline."""
    assert isinstance(image.condition, ClassLabel)
    return {
        "class_labels": [image.condition.index],
        "guidance_scale": request.recipe.guidance.scale if request.recipe.guidance.guided else 1.0,
        "generator": torch.Generator("cpu").manual_seed(image.seed),
        "num_inference_steps": request.recipe.steps,
    }


def _dit(family: Any, dtype: torch.dtype) -> Any:
    if family.null_class != NULL_CLASS:
        raise InvalidValue(f"model: diffusers' DiTPipeline draws {NULL_CLASS} classes, not {family.null_class}")
    scheduler = scheduler_of(family.card.schedule, "ddim")
    return _UNTYPED.DiTPipeline(_as(family.network, dtype), _as(family.vae, dtype), scheduler)


def _sd3(family: Any, dtype: torch.dtype) -> Any:
    encoders = _encoders(("", family.clips[0]), ("_2", family.clips[1]), ("_3", family.t5), dtype=dtype)
    return _UNTYPED.StableDiffusion3Pipeline(
        transformer=_as(family.network, dtype),
        vae=_as(family.vae, dtype),
        scheduler=scheduler_of(family.card.schedule, "flow_euler"),
        **encoders,
    )


def _flux(family: Any, dtype: torch.dtype) -> Any:
    return _UNTYPED.FluxPipeline(
        transformer=_as(family.network, dtype),
        vae=_as(family.vae, dtype),
        scheduler=scheduler_of(family.card.schedule, "flow_euler"),
        **_encoders(("", family.clip), ("_2", family.t5), dtype=dtype),
    )


def _unet(family: Any, dtype: torch.dtype) -> Any:
    first, second = family.encoders["text_encoder"], family.encoders["text_encoder_2"]
    parts = {"unet": _as(family.network, dtype), "vae": _as(family.vae, dtype)}
    parts["scheduler"] = scheduler_of(family.card.schedule, "euler")
    if family.added:
        encoders = _encoders(("", first), ("_2", second), dtype=dtype)
        zeros = family.card.force_zeros
        return _UNTYPED.StableDiffusionXLPipeline(**parts, **encoders, force_zeros_for_empty_prompt=zeros)
    unserved = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return _UNTYPED.StableDiffusionPipeline(**parts, **_encoders(("", first), dtype=dtype), **unserved)


_PIPELINES = {"dit": _dit, "sd3": _sd3, "flux": _flux, "unet": _unet}


def _encoders(*named: tuple[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    parts: dict[str, Any] = {}
    for suffix, encoder in named:
        parts[f"text_encoder{suffix}"] = _as(encoder.network, dtype) if encoder else None
        parts[f"tokenizer{suffix}"] = encoder.tokenizer if encoder else None
    return parts


def _as(network: Any, dtype: torch.dtype) -> Any:
    """The network in this format, as its class is written: itself, or a copy if it is not so."""
    if network.dtype != dtype:
        return copy.deepcopy(network).to(dtype)
    compiled = any(module._compiled_call_impl is not None for module in network.modules())
    return _copied(network) if compiled else network


def _copied(network: Any) -> Any:
    """Another module of the same tensors; what was compiled is not copied."""
    tensors = (*network.parameters(), *network.buffers())
    return copy.deepcopy(network, {id(tensor): tensor for tensor in tensors})
