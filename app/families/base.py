"""Family: what a network is, seen from the engine. The protocol that dit.py and sd3.py (and later files) fulfil.

Knows nothing of requests' life, samplers or batches: it maps (latents, timesteps, conditions) to an output.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Protocol

import torch

from app.cards.card import Card
from app.families.text import Read, read_texts
from app.report import Phase
from app.request import Condition

Conditions = dict[str, torch.Tensor]
"""Tensors by name, first axis = passes; what one pass needs besides its latent and timestep."""


class Family(Protocol):
    """A network with its text encoders and VAE, in eval mode on one device, described by one card.

    It is built before its weights are there (the pool brings them, phase by phase), so the constructor reads configs
    only. Every method runs under `torch.inference_mode()` set by the caller, on the thread that owns the device; only
    the constructor and `prepare` run on the loader's. `encode`, `denoise` and `decode` need the parts of that phase.
    """

    phases: ClassVar[Mapping[Phase, tuple[str, ...]]]
    """Names of the parts with weights that each phase needs on the device."""

    card: Card
    network: Any
    """The denoising network, a torch module."""
    device: torch.device
    dtype: torch.dtype
    learned_variance: bool
    """Whether `denoise` returns frac, the learned-range interpolation of a DiT's variance channels."""

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latent of an image of width x height pixels."""

    def image_tokens(self, width: int, height: int) -> int:
        """Number of image tokens, which resolution-dependent shift is a function of."""

    def opposite(self, condition: Condition) -> Condition:
        """The condition that guidance moves away from: the negative prompt as a Prompt, or the null class."""

    def encode(
        self, conditions: Sequence[Condition], text_length: int, batch: int | None = None, read: Read = read_texts
    ) -> Conditions:
        """Conditions for len(conditions) passes, in order; `Prompt.negative` is not read here.

        text_length: padded length of the longest encoder (T5) in tokens. batch: pad every encoder forward to this
        fixed batch size (deterministic mode); None runs them all in one batch of their own number. read: what gives
        the encoders' outputs, so that what they gave before need not be encoded again.
        """

    def blank(self, text_length: int) -> Conditions:
        """Conditions of one pass that stand for any, for measuring: right shapes and formats, no meaning."""

    def truncated(self, condition: Condition, text_length: int) -> str | None:
        """The text that the encoders will not see because the prompt is too long; None when nothing is cut."""

    def denoise(
        self, x: torch.Tensor, t: torch.Tensor, conditions: Conditions
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One forward of P passes.

        x: [P, C, h, w] float32, already scaled by c_in. t: [P] float32, as the network was trained (0..1000).
        Returns (out [P, C, h, w] float32, frac [P, C, h, w] float32 in [0, 1], or None without learned variance).
        """

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """latents [B, C, h, w] float32, as the sampler leaves them -> uint8 [B, H, W, 3] on the same device.

        Raises NonFiniteOutput when any image of the batch comes out as numbers that are not finite.
        """

    def prepare(self) -> None:
        """What is computed once from the VAE's weights, which must be there: the map that `preview` uses."""

    def preview(self, latents: torch.Tensor) -> torch.Tensor:
        """A quick look at predicted clean latents, much cheaper than `decode`; same shapes, same error."""
