"""SD3: MMDiT networks with two CLIPs and a T5 (Esser et al. 2024, arXiv:2403.03206) on diffusers' network."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch.nn.functional import pad

from app.cards.card import Card
from app.families.base import CLIP_TOKENIZER, T5_TOKENIZER, Conditions, Denoised, Family
from app.families.compiling import as_written
from app.families.text import Encoder, Read, clip_states, prompt_text, read_texts, t5_states
from app.request import Condition


class SD3(Family):
    """An MMDiT with its VAE and whichever of its three text encoders the checkpoint holds.

    Conditions: `text` [P, card.text.clip + text_length, joint width], `pooled` [P, pooled width].
    An absent T5 is zeros of the same length, as in diffusers. An absent CLIP is zeros in its share of the widths, as in
    ComfyUI (diffusers cannot leave one out), so that the other one keeps the channels it was trained on; its hidden
    width is taken to be its pooled width, as it is in both of SD3's CLIPs.
    """

    parts: ClassVar = {
        "transformer": ("SD3Transformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "text_encoder_3": ("T5EncoderModel",),
        "tokenizer": CLIP_TOKENIZER,
        "tokenizer_2": CLIP_TOKENIZER,
        "tokenizer_3": T5_TOKENIZER,
    }

    def __init__(self, card: Card, parts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype) -> None:
        """Raises CheckpointError: the parts do not fit."""
        super().__init__(card, parts, device, dtype)
        self.patch: int = self.config.patch_size
        self.clips = self._encoder(parts, "", clip_states), self._encoder(parts, "_2", clip_states)
        self.t5 = self._encoder(parts, "_3", t5_states)
        self.shares = self._clip_shares()
        self._check()

    def encoders(self, text_length: int) -> list[tuple[Encoder | None, int]]:
        """Both CLIPs and the T5."""
        return [*((clip, self.card.text.clip) for clip in self.clips), (self.t5, text_length)]

    def encode(
        self, conditions: Sequence[Condition], text_length: int, batch: int | None = None, read: Read = read_texts
    ) -> Conditions:
        """As StableDiffusion3Pipeline.encode_prompt. Raises InvalidValue for a class label."""
        texts = [prompt_text(condition) for condition in conditions]
        count, length, joint = len(texts), self.card.text.clip, self.config.joint_attention_dim
        hidden, pooled = [], []
        for encoder, (width, projection) in zip(self.clips, self.shares, strict=True):
            if encoder:
                states, summary = read(encoder, texts, length, batch)
            else:
                states, summary = self._zeros(count, length, width), self._zeros(count, projection)
            hidden.append(states.to(self.dtype))
            pooled.append(summary.to(self.dtype))
        clip = torch.cat(hidden, dim=-1)
        clip = pad(clip, (0, joint - clip.shape[-1]))
        t5 = read(self.t5, texts, text_length, batch)[0] if self.t5 else self._zeros(count, text_length, joint)
        return {"text": torch.cat([clip, t5.to(self.dtype)], dim=-2), "pooled": torch.cat(pooled, dim=-1)}

    def blank(self, text_length: int) -> Conditions:
        """Zeros of the shapes that `encode` gives."""
        return super().blank(self.card.text.clip + text_length)

    def denoise(self, x: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> Denoised:
        """As the base class; passes in the engine's `skip` [P] leave out the card's skip layers."""
        with self._skipping(conditions.get("skip")):
            out = self.network(
                hidden_states=x.to(self.dtype),
                timestep=t,
                encoder_hidden_states=conditions["text"],
                pooled_projections=conditions["pooled"],
                return_dict=False,
            )[0]
        return out.float(), None

    @contextmanager
    def _skipping(self, skips: torch.Tensor | None) -> Iterator[None]:
        """The card's skip layers hand on their inputs for passes in `skips` [P]: diffusers' `skip_layers`, by row."""
        # For one forward only, because another card may share the network.
        facts = self.card.skip_layer_guidance
        if skips is None or facts is None:
            yield
            return
        mask = skips[:, None, None]

        def skip(block: Any, args: Any, kwargs: dict[str, Any], output: Any) -> Any:
            inputs = kwargs["encoder_hidden_states"], kwargs["hidden_states"]
            return tuple(torch.where(mask, *pair) for pair in zip(inputs, output, strict=True))

        blocks = [self.network.transformer_blocks[layer] for layer in facts.layers]
        hooks = [block.register_forward_hook(skip, with_kwargs=True) for block in blocks]
        try:
            with as_written(self.network):
                yield
        finally:
            for hook in hooks:
                hook.remove()

    def _clip_shares(self) -> list[tuple[int, int]]:
        """(hidden width, pooled width) of each CLIP; an absent one gets what the present one leaves of the pooled."""
        held = [(c[0].config.hidden_size, c[0].config.projection_dim) if c else None for c in self.clips]
        rest = self.config.pooled_projection_dim - sum(share[1] for share in held if share)
        shares = []
        for share in held:
            shares.append(share or (rest, rest))
            rest = rest if share else 0
        return shares

    def _check(self) -> None:
        config, skipped = self.config, self.card.skip_layer_guidance
        problems = {
            **self._size_problems(),
            "limits.sizes.max: over the network's position table": self.card.limits.sizes.max
            > self.scale * self.patch * config.pos_embed_max_size,
            "the CLIPs' pooled widths are not the network's": sum(s[1] for s in self.shares)
            != config.pooled_projection_dim,
            "the CLIPs are wider than the network": sum(s[0] for s in self.shares) > config.joint_attention_dim,
            "the T5 is not as wide as the network": self.t5 and self.t5[0].config.d_model != config.joint_attention_dim,
            "text.clip: longer than the CLIPs' position tables": any(
                self.card.text.clip > clip[0].config.max_position_embeddings for clip in self.clips if clip
            ),
            "the VAE has another number of latent channels": self.channels != config.in_channels,
            "skip_layer_guidance.layers: the network has not these blocks, or one is its last": skipped
            and max(skipped.layers) >= config.num_layers - 1,
        }
        self._refuse(problems)
