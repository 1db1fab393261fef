"""DiT: class-conditional diffusion transformers (Peebles and Xie 2022, arXiv:2212.09748) on diffusers' network."""

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from diffusers.models.embeddings import CombinedTimestepLabelEmbeddings
from torch import nn

from app.cards.card import Card
from app.errors import InvalidValue
from app.families.base import Conditions, Denoised, Family
from app.families.text import Read, read_texts
from app.request import ClassLabel, Condition, Pass


class DiT(Family):
    """A DiT with its VAE. Conditions: `label` int64 [P]. Square, at the size it was trained on."""

    parts: ClassVar = {"transformer": ("DiTTransformer2DModel", "Transformer2DModel"), "vae": ("AutoencoderKL",)}

    def _fit(self) -> None:
        card, config, sizes, labels = self.card, self.config, self.card.limits.sizes, len(self.card.labels)
        self.patch, self.null_class = config.patch_size, config.num_embeds_ada_norm
        self.learned_variance = card.schedule.variance == "learned_range"
        side, outputs = config.sample_size * self.scale, config.out_channels or config.in_channels
        fits = outputs == 2 * self.channels or (outputs == self.channels and not self.learned_variance)
        self._require((sizes.min, sizes.max) == (side, side), f"limits.sizes: this network takes {side}x{side} only")
        self._require(
            self.channels == config.in_channels,
            f"the network has {config.in_channels} latent channels, the VAE {self.channels}",
        )
        self._require(fits, f"schedule.variance: the network has {outputs} output channels")
        self._require(labels <= self.null_class, f"{labels} labels, but the network knows {self.null_class} classes")
        _apply(self.network, card.time_freq_shift, card.norm_eps)

    @staticmethod
    def traits(card: Card, part: str) -> tuple[float | None, ...]:
        """Those of the arithmetic that a card changes in its network."""
        return (card.time_freq_shift, card.norm_eps) if part == "transformer" else ()

    def opposite(self, condition: Condition) -> Condition:
        """The null class, which is the last row of the label embedding."""
        return ClassLabel(self.null_class)

    def encode(
        self, passes: Sequence[Pass], text_length: int, batch: int | None = None, read: Read = read_texts
    ) -> Conditions:
        """`label` [P]. InvalidValue for a prompt or a class that the network has no embedding of."""
        indices = [one.condition.index if isinstance(one.condition, ClassLabel) else -1 for one in passes]
        # NOTE: an index past the embedding would poison the whole CUDA context, so it is refused on the host.
        if not all(0 <= index <= self.null_class for index in indices):
            raise InvalidValue(f"class_label must be between 0 and {self.null_class - 1}", param="class_label")
        return {"label": torch.tensor(indices, dtype=torch.int64, device=self.device)}

    def blank(self, text_length: int) -> Conditions:
        """The first class."""
        return self.encode([Pass(ClassLabel(0))], text_length)

    def denoise(self, x: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> Denoised:
        """As the base class.

        frac = (v + 1) / 2 of the variance channels v (Nichol and Dhariwal 2021, eq. 15): 0 is the lower bound of the
        log variance, 1 the upper. NOTE: as in the original it is not clamped.
        """
        out = predict(self.network, x.to(self.dtype), t, conditions["label"]).float()
        frac = (out[:, self.channels :] + 1) / 2 if self.learned_variance else None
        return out[:, : self.channels], frac


class SharedEmbedder(CombinedTimestepLabelEmbeddings):
    """The timestep and label embedders of all blocks; an embedding as `timestep` passes through."""

    def __init__(self, own: CombinedTimestepLabelEmbeddings) -> None:
        nn.Module.__init__(self)
        self.time_proj, self.timestep_embedder = own.time_proj, own.timestep_embedder
        self.class_embedder = own.class_embedder

    def forward(
        self, timestep: torch.Tensor, class_labels: torch.Tensor, hidden_dtype: torch.dtype | None = None
    ) -> torch.Tensor:
        """timestep [P], class_labels [P] -> [P, D]; a timestep [P, D] is the answer already."""
        if timestep.ndim == 2:
            return timestep
        embedded: torch.Tensor = super().forward(timestep, class_labels, hidden_dtype)
        return embedded


def share_embedders(network: Any) -> None:
    """Give all blocks the embedders of the first, as in the original.

    The names in the state stay diffusers' own: every block's, of one tensor.
    """
    shared = SharedEmbedder(network.transformer_blocks[0].norm1.emb)
    for block in network.transformer_blocks:
        block.norm1.emb = shared


def predict(network: Any, x: torch.Tensor, t: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """One forward: [P, 2C or C, h, w]. A shared embedder embeds once and not once a block."""
    if isinstance(embedder := network.transformer_blocks[0].norm1.emb, SharedEmbedder):
        t = embedder(t, labels, hidden_dtype=x.dtype)
    out: torch.Tensor = network(x, timestep=t, class_labels=labels, return_dict=False)[0]
    return out


def _apply(network: nn.Module, time_freq_shift: float | None, norm_eps: float | None) -> None:
    """Turn diffusers' arithmetic into the original's where the card says so (facebookresearch/DiT models.py).

    diffusers divides the frequencies' exponents by half - 1 (shift 1), the original by half (shift 0); diffusers'
    second norm of a block has eps 1e-5, the original's norms all 1e-6.
    """
    for module in network.modules():
        if time_freq_shift is not None and hasattr(module, "downscale_freq_shift"):
            module.downscale_freq_shift = time_freq_shift  # type: ignore[assignment]
        if norm_eps is not None and isinstance(module, nn.LayerNorm):
            module.eps = norm_eps
