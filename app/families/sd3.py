"""SD3: MMDiT networks with two CLIPs and a T5 (Esser et al. 2024, arXiv:2403.03206) on diffusers' network."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch.nn.functional import pad

from app.families.base import CLIP_TOKENIZER, T5_TOKENIZER, Conditions, Denoised, Family, Outputs
from app.families.compiling import as_written
from app.families.text import clip_states, t5_states


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
    reads: ClassVar = {"text_encoder": clip_states, "text_encoder_2": clip_states, "text_encoder_3": t5_states}

    def _fit(self) -> None:
        config, skipped = self.config, self.card.skip_layer_guidance
        self.patch = config.patch_size
        *self.clips, self.t5 = self.encoders.values()
        self.shares = self._clip_shares()
        hidden, pooled = (sum(widths) for widths in zip(*self.shares, strict=True))
        largest = self.scale * self.patch * config.pos_embed_max_size
        self._check_sizes()
        self._require(self.card.limits.sizes.max <= largest, "limits.sizes.max: over the network's position table")
        self._require(pooled == config.pooled_projection_dim, "the CLIPs' pooled widths are not the network's")
        self._require(hidden <= config.joint_attention_dim, "the CLIPs are wider than the network")
        self._require(self.channels == config.in_channels, "the VAE has another number of latent channels")
        self._require(
            skipped is None or max(skipped.layers) < config.num_layers - 1,
            "skip_layer_guidance.layers: the network has not these blocks, or one is its last",
        )

    def join(self, text_length: int, outputs: Outputs) -> Conditions:
        """As StableDiffusion3Pipeline.encode_prompt."""
        length, joint = self.card.text.clip, self.config.joint_attention_dim
        both = [
            outputs(name, (length, width), (projection,))
            for name, (width, projection) in zip(("text_encoder", "text_encoder_2"), self.shares, strict=True)
        ]
        hidden, pooled = (torch.cat(states, dim=-1) for states in zip(*both, strict=True))
        (t5,) = outputs("text_encoder_3", (text_length, joint))
        return {"text": torch.cat([pad(hidden, (0, joint - hidden.shape[-1])), t5], dim=-2), "pooled": pooled}

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
        configs = [clip.network.config if clip else None for clip in self.clips]
        known = [(config.hidden_size, config.projection_dim) if config else None for config in configs]
        rest = self.config.pooled_projection_dim - sum(share[1] for share in known if share)
        shares = []
        for share in known:
            shares.append(share or (rest, rest))
            rest = rest if share else 0
        return shares
