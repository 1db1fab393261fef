"""SD3: MMDiT networks with two CLIPs and a T5 (Esser et al. 2024, arXiv:2403.03206) on diffusers' network.

Knows nothing of samplers: shift, spacing and defaults stand in the card; a turbo is a card of this family.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch.nn.functional import pad

from app.cards.card import Card
from app.errors import CheckpointError
from app.families.base import Conditions
from app.families.compiling import as_written
from app.families.text import Read, clip_states, prompt_text, read_texts, t5_states, text_encoder, unseen_text
from app.families.vae import decode, linear_preview, pixels_per_latent
from app.report import Phase
from app.request import Condition, Prompt


class SD3:
    """An MMDiT with its VAE and whichever of its three text encoders the checkpoint holds.

    Conditions: `text` [P, card.text.clip + text_length, joint width], `pooled` [P, pooled width].
    An absent T5 is zeros of the same length, as in diffusers. An absent CLIP is zeros in its share of the widths,
    so that the other one keeps the channels it was trained on; its hidden width is taken to be its pooled width, as
    it is in both of SD3's CLIPs. (diffusers cannot leave out a CLIP; ComfyUI fills in the same zeros.)
    """

    parts: ClassVar[dict[str, tuple[str, ...]]] = {
        "transformer": ("SD3Transformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModelWithProjection",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "text_encoder_3": ("T5EncoderModel",),
        "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "tokenizer_2": ("CLIPTokenizer", "CLIPTokenizerFast"),
        "tokenizer_3": ("T5Tokenizer", "T5TokenizerFast"),
    }
    required: ClassVar[tuple[str, ...]] = ("transformer", "vae")
    phases: ClassVar[Mapping[Phase, tuple[str, ...]]] = {
        "encode": ("text_encoder", "text_encoder_2", "text_encoder_3"),
        "denoise": ("transformer",),
        "decode": ("vae",),
    }
    learned_variance = False

    def __init__(self, card: Card, parts: dict[str, Any], device: torch.device | str, dtype: torch.dtype) -> None:
        """parts: built components by their names in model_index.json. Raises CheckpointError: they do not fit."""
        self.card, self.device, self.dtype = card, torch.device(device), dtype
        self.network, self.vae = parts["transformer"], parts["vae"]
        self.config = self.network.config
        self.scale = pixels_per_latent(self.vae)
        self.clips = text_encoder(card, parts, "", clip_states), text_encoder(card, parts, "_2", clip_states)
        self.t5 = text_encoder(card, parts, "_3", t5_states)
        self.shares = self._clip_shares()
        self._check()

    @staticmethod
    def traits(card: Card, part: str) -> tuple[float | None, ...]:
        """Nothing of the card changes a part itself."""
        return ()

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latent of an image of width x height pixels."""
        return self.config.in_channels, height // self.scale, width // self.scale

    def image_tokens(self, width: int, height: int) -> int:
        """Number of image tokens."""
        cell = self.scale * self.config.patch_size
        return int((height // cell) * (width // cell))

    def opposite(self, condition: Condition) -> Condition:
        """The negative prompt, as a prompt."""
        return Prompt((condition.negative or "") if isinstance(condition, Prompt) else "")

    def truncated(self, condition: Condition, text_length: int) -> str | None:
        """The end of the prompt that no encoder sees, as the user wrote it; None when one of them sees all."""
        encoders = [*((clip, self.card.text.clip) for clip in self.clips), (self.t5, text_length)]
        return unseen_text(encoders, prompt_text(condition))

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
        length = self.card.text.clip + text_length
        text = self._zeros(1, length, self.config.joint_attention_dim)
        return {"text": text, "pooled": self._zeros(1, self.config.pooled_projection_dim)}

    def denoise(
        self, x: torch.Tensor, t: torch.Tensor, conditions: Conditions
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """x [P, C, h, w] float32, t [P] float32 (0..1000) -> (out float32 [P, C, h, w], None)."""
        with self._skipping(conditions.get("skip")):
            out = self.network(
                hidden_states=x.to(self.dtype),
                timestep=t,
                encoder_hidden_states=conditions["text"],
                pooled_projections=conditions["pooled"],
                return_dict=False,
            )[0]
        return out.float(), None

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """latents [B, C, h, w] float32 -> uint8 [B, H, W, 3]."""
        return decode(self.vae, latents)

    def prepare(self) -> None:
        """Fit the VAE's linear map, once for all models that share it."""
        linear_preview(self.vae)

    def preview(self, latents: torch.Tensor) -> torch.Tensor:
        """predicted clean latents [B, C, h, w] float32 -> uint8 [B, H, W, 3], by the decoder's nearest linear map."""
        return linear_preview(self.vae)(latents)

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

    def _zeros(self, *shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=self.device, dtype=self.dtype)

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
        file, config, sizes = self.card.folder / "card.toml", self.config, self.card.limits.sizes
        problems = {
            "limits.sizes.multiple: not a multiple of the network's patches": sizes.multiple % self._cell(),
            "limits.sizes.min: not a multiple of the network's patches": sizes.min % self._cell(),
            "limits.sizes.max: over the network's position table": sizes.max > self._cell() * config.pos_embed_max_size,
            "the CLIPs' pooled widths are not the network's": sum(s[1] for s in self.shares)
            != config.pooled_projection_dim,
            "the CLIPs are wider than the network": sum(s[0] for s in self.shares) > config.joint_attention_dim,
            "the T5 is not as wide as the network": self.t5 and self.t5[0].config.d_model != config.joint_attention_dim,
            "text.clip: longer than the CLIPs' position tables": any(
                self.card.text.clip > clip[0].config.max_position_embeddings for clip in self.clips if clip
            ),
            "the VAE has another number of latent channels": self.vae.config.latent_channels != config.in_channels,
            "skip_layer_guidance.layers: the network has not these blocks, or one is its last": self._last_skipped()
            >= config.num_layers - 1,
        }
        for problem, found in problems.items():
            if found:
                raise CheckpointError(f"{file}: {problem}")

    def _last_skipped(self) -> int:
        return max(self.card.skip_layer_guidance.layers) if self.card.skip_layer_guidance else -1

    def _cell(self) -> int:
        return int(self.scale * self.config.patch_size)
