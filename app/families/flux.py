"""FLUX.1: rectified flow transformers with a CLIP and a T5 (Black Forest Labs 2024) on diffusers' network.

Dev and schnell are cards of this family.
"""

from typing import Any, ClassVar

import torch
from torch.nn.functional import pad, pixel_shuffle, pixel_unshuffle

from app.families.base import CLIP_TOKENIZER, T5_TOKENIZER, Conditions, Denoised, Family, Outputs
from app.families.text import clip_pooled, t5_states

PATCH = 2
"""Latent pixels along a side of what is packed into one token."""


class Flux(Family):
    """A FLUX transformer with its VAE and whichever of its two text encoders the checkpoint holds.

    Conditions: `text` [P, text_length, joint width] of the T5, `pooled` [P, pooled width] of the CLIP, and where the
    card says `guidance = "embedded"` the engine's `guidance` [P]. An absent encoder is zeros of the same shape.
    """

    parts: ClassVar = {
        "transformer": ("FluxTransformer2DModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel", "CLIPTextModelWithProjection"),
        "text_encoder_2": ("T5EncoderModel",),
        "tokenizer": CLIP_TOKENIZER,
        "tokenizer_2": T5_TOKENIZER,
    }
    reads: ClassVar = {"text_encoder": clip_pooled, "text_encoder_2": t5_states}
    patch = PATCH

    def _fit(self) -> None:
        self.clip, self.t5 = self.encoders.values()
        self.embedded = self.card.guidance == "embedded"
        config, channels = self.config, PATCH**2 * self.channels
        takes = "embedded" if config.guidance_embeds else "cfg"
        self._check_sizes()
        self._require(
            self.card.guidance == takes,
            f'guidance: this is a network for "{takes}": its guidance_embeds is {config.guidance_embeds}',
        )
        self._require(
            (config.in_channels, self.network.out_channels) == (channels, channels),
            "the network's channels are not the VAE's, packed",
        )
        self._require(config.patch_size == 1, "patch_size: the network is not FLUX.1's, which packs outside")
        self._require(
            _turns(config.axes_dims_rope, config.attention_head_dim),
            "axes_dims_rope: not three even numbers that add up to attention_head_dim",
        )
        self._require(
            self.clip is None or self.clip.network.config.hidden_size == config.pooled_projection_dim,
            "the CLIP is not as wide as the network's pooled input",
        )

    def join(self, text_length: int, outputs: Outputs) -> Conditions:
        """As FluxPipeline.encode_prompt."""
        (text,) = outputs("text_encoder_2", (text_length, self.config.joint_attention_dim))
        (pooled,) = outputs("text_encoder", (self.config.pooled_projection_dim,))
        return {"text": text, "pooled": pooled}

    def blank(self, text_length: int) -> Conditions:
        """Zeros of the shapes that `encode` gives, and the guidance that the engine adds to them."""
        scale = {"guidance": torch.ones(1, device=self.device)} if self.embedded else {}
        return {**super().blank(text_length), **scale}

    def denoise(self, x: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> Denoised:
        """As the base class.

        NOTE: the network multiplies t / 1000 by 1000 again, in its own number format: in bfloat16 857.14 becomes 856,
        and a guidance of 3.5 is 3504 for 3500. The authors' own code rounds exactly so (sampling.py and layers.py of
        black-forest-labs/flux), so it stays. diffusers' pipeline rounds t before it divides as well, and is off by one
        more rounding at a quarter of the timesteps.
        """
        height, width = x.shape[2] // PATCH, x.shape[3] // PATCH
        out = self.network(
            hidden_states=pack(x.to(self.dtype)),
            timestep=t / 1000,
            guidance=conditions["guidance"] if self.embedded else None,
            encoder_hidden_states=conditions["text"],
            pooled_projections=conditions["pooled"],
            txt_ids=torch.zeros(conditions["text"].shape[1], 3, dtype=torch.int64, device=x.device),
            img_ids=image_ids(height, width, x.device),
            return_dict=False,
        )[0]
        return unpack(out.float(), height, width), None


def _turns(axes: Any, width: int) -> bool:
    """Whether a config's rotary axes are of a head so wide. They come from a file and may be anything."""
    whole = isinstance(axes, list | tuple) and all(type(axis) is int and axis > 0 and axis % 2 == 0 for axis in axes)
    return whole and len(axes) == 3 and sum(axes) == width


def pack(x: torch.Tensor) -> torch.Tensor:
    """[P, C, 2h, 2w] -> [P, h w, 4C]: a token holds 2x2 latent pixels, channel by channel (pipeline_flux.py)."""
    return pixel_unshuffle(x, PATCH).flatten(2).transpose(1, 2).contiguous()


def unpack(tokens: torch.Tensor, height: int, width: int) -> torch.Tensor:
    """[P, height width, 4C] -> [P, C, 2 height, 2 width]: the inverse of `pack`."""
    return pixel_shuffle(tokens.transpose(1, 2).reshape(len(tokens), -1, height, width), PATCH).contiguous()


def image_ids(height: int, width: int, device: torch.device) -> torch.Tensor:
    """(0, row, column) of every token, int64 [height width, 3], which its rotary embedding is a function of."""
    rows, columns = (torch.arange(count, device=device) for count in (height, width))
    return pad(torch.cartesian_prod(rows, columns), (1, 0))
