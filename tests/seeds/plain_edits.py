"""What the body of an edit is drawn as, plainly: a loop over a scheduler of diffusers, in float64, for every sampler.

No pipeline of diffusers starts a DiT from a picture, or SD3 with a solver that is not Euler's. A fault is what an
implementation might get wrong, made on purpose.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution
from torch import Generator, Tensor
from torch.nn.functional import interpolate

from app.cards.card import Card
from app.cards.cards import read_card
from tests.parts.edits import as_field
from tests.samplers.oracle import NOISY, Edit, begin, diffusion_scheduler, flow_scheduler, wide
from tests.seeds import plain_sd3
from tests.seeds.upstream import Body, length, opened, opened_image

Fault = Literal["", "later", "earlier", "inverted", "mode", "swapped"]
"""The start a step too late or too early, the mask inverted, the mode of the posterior instead of a sample, and the
first noise drawn before that sample instead of after it."""
FAULTS: tuple[Fault, ...] = ("later", "earlier", "inverted", "mode", "swapped")

Network = Callable[[Tensor, float], Tensor]


@contextmanager
def faulty(fault: Fault, body: Body) -> Iterator[Body]:
    """The body with which diffusers makes the fault, and its autoencoder as it makes it."""
    steps = body["num_inference_steps"]
    moved = {"later": -1, "earlier": 1}.get(fault, 0) / steps
    wrong = {**body, "strength": body["strength"] + moved}
    if fault == "inverted":
        wrong["mask_image"] = as_field(255 - np.asarray(opened_image(body["mask_image"])))
    with pytest.MonkeyPatch.context() as patch:
        if fault in SAMPLED:
            patch.setattr(DiagonalGaussianDistribution, "sample", SAMPLED[fault])
        yield wrong


def _mode(self: Any, generator: Generator | None = None) -> Tensor:
    torch.randn(self.mean.shape, generator=generator)
    mean: Tensor = self.mean
    return mean


def _after_the_noise(self: Any, generator: Generator) -> Tensor:
    """A sample of what the generator draws second, before it draws the first once more."""
    state = generator.get_state()
    torch.randn(self.mean.shape, generator=generator)
    sample: Tensor = self.mean + self.std * torch.randn(self.mean.shape, generator=generator)
    generator.set_state(state)
    return sample


SAMPLED = {"mode": _mode, "swapped": _after_the_noise}


@torch.no_grad()
def plain_latent(folder: Path, body: Body, fault: Fault = "", pipeline: Any = None) -> Tensor:
    """[1, C, h, w] float64, the final latent of the body of an edit. pipeline: another than that of the folder."""
    pipeline, card = pipeline or opened(folder), read_card(folder / "card.toml")
    with faulty(fault, body) as body:
        solve = _authors if body["sampler"] == "flow_dpmpp_2m_sd3" else _diffusers
        network, drawn = _network(pipeline, card, body), _drawn(pipeline, body)
        with wide(), _float32_noise():
            return solve(card, body, network, drawn)


@dataclass(frozen=True)
class Drawn:
    """What the random numbers of a seed make, float64 [1, C, h, w]. mask: bool [1, 1, h, w], True where it is new."""

    image: Tensor
    noise: Tensor
    mask: Tensor | None
    dice: Generator


def _drawn(pipeline: Any, body: Body) -> Drawn:
    vae, dice, mask = pipeline.vae, Generator().manual_seed(body["seed"]), None
    pixels = torch.from_numpy(np.array(opened_image(body["image"]), np.float32)).permute(2, 0, 1)[None] / 127.5 - 1
    image = vae.encode(pixels).latent_dist.sample(dice)
    image = (image.double() - (vae.config.shift_factor or 0.0)) * vae.config.scaling_factor
    noise = torch.randn(image.shape, generator=dice).double()
    if "mask_image" in body:
        torch.randn(image.shape, generator=dice)  # a sample of the masked picture, which no network here sees
        whole = torch.from_numpy(np.array(opened_image(body["mask_image"])) >= 128).double()
        mask = interpolate(whole[None, None], size=image.shape[2:]) > 0.5
    return Drawn(image, noise, mask, dice)


def _diffusers(card: Card, body: Body, network: Network, drawn: Drawn) -> Tensor:
    """By diffusers' scheduler of the body's sampler."""
    schedule, sampler, steps, strength = card.schedule, body["sampler"], body["num_inference_steps"], body["strength"]
    if schedule.kind == "flow":
        scheduler = flow_scheduler(schedule, sampler, steps, 0.0)
    else:
        scheduler = diffusion_scheduler(schedule, sampler, schedule.prediction)
        scheduler.set_timesteps(steps)
    timesteps, x, blend = begin(scheduler, drawn.noise, Edit(drawn.image, strength, drawn.mask))
    random = {"generator": drawn.dice} if sampler in ("ddpm", "euler_ancestral", "dpmpp_2m_sde", "lcm") else {}
    for number, t in enumerate(timesteps):
        seen = scheduler.scale_model_input(x, t) if hasattr(scheduler, "scale_model_input") else x
        out = network(seen, float(t))
        x = blend(
            scheduler.step(out if sampler == "ddpm" else out[:, : x.shape[1]], t, x, **random).prev_sample, number
        )
    return x


def _authors(card: Card, body: Body, network: Network, drawn: Drawn) -> Tensor:
    """By the multistep of SD3's authors."""
    steps = body["num_inference_steps"]
    levels = plain_sd3.sigmas(card.schedule.shift, steps)
    levels = levels[int(max(steps - min(steps * body["strength"], steps), 0)) :]

    def noisy(level: float) -> Tensor:
        return (1 - level) * drawn.image + level * drawn.noise

    return plain_sd3.dpmpp_2m(
        lambda x, level: x - level * network(x, 1000 * level),
        noisy(levels[0]),
        levels,
        lambda x, level: x if drawn.mask is None else torch.where(drawn.mask, x, noisy(level)),
    )


@contextmanager
def _float32_noise() -> Iterator[None]:
    """The noise of steps drawn in float32, whatever the latent's format: its bits depend on that."""
    with pytest.MonkeyPatch.context() as patch:
        for module in NOISY:
            patch.setattr(
                module,
                "randn_tensor",
                lambda shape, generator, **_: torch.randn(shape, generator=generator, dtype=torch.float32).double(),
            )
        yield


@cache
def _double(network: Any) -> Any:
    return copy.deepcopy(network).double()


def _network(pipeline: Any, card: Card, body: Body) -> Network:
    """The network of latent and timestep, guided as the body says; the channels of a learned variance come last."""
    scale, network = body["guidance_scale"], _double(pipeline.transformer)
    conditions = (_labels if card.draws_classes else _texts)(pipeline, card, body)

    def output(x: Tensor, t: float) -> Tensor:
        channels, passes = x.shape[1], len(next(iter(conditions.values())))
        time = torch.full((passes,), t, dtype=torch.float64)
        out: Tensor = network(x.repeat(passes, 1, 1, 1), timestep=time, **conditions).sample
        own, rest = out[:1, :channels], out[:1, channels:]
        if passes == 2:
            own = out[1:, :channels] + scale * (own - out[1:, :channels])
        return torch.cat([own, rest], 1)

    return output


def _labels(pipeline: Any, card: Card, body: Body) -> dict[str, Tensor]:
    """DiTPipeline's: the class, and where it is guided the null class."""
    return {"class_labels": torch.tensor([body["class_label"], 1000][: 1 + (body["guidance_scale"] > 1)])}


def _texts(pipeline: Any, card: Card, body: Body) -> dict[str, Tensor]:
    """StableDiffusion3Pipeline's: the prompt, and where it is guided the negative prompt."""
    guided = body["guidance_scale"] > 1
    text, negative, pooled, negative_pooled = pipeline.encode_prompt(
        body["prompt"], None, None, do_classifier_free_guidance=guided,
        negative_prompt=body.get("negative_prompt", ""), max_sequence_length=length(card, body),
    )  # fmt: skip
    both = {"encoder_hidden_states": (text, negative), "pooled_projections": (pooled, negative_pooled)}
    return {name: torch.cat(pair[: 1 + guided]).double() for name, pair in both.items()}
