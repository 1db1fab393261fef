"""UNet: latent diffusion's U-Nets (Rombach et al. 2022, arXiv:2112.10752) with one or two CLIPs, on diffusers' network.

SD 1.5, SD 2, SDXL (Podell et al. 2023, arXiv:2307.01952), its refiner and the turbos are cards of this family; what
distinguishes them is in their configs.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from typing import Any, ClassVar

import torch

from app.errors import InvalidValue
from app.families.base import CLIP_TOKENIZER, Conditions, Denoised, Family, Outputs
from app.families.text import Encoder, Read, States, read_texts
from app.request import Condition, Framing, Pass, Prompt, Recipe

SCORE, LOW_SCORE = 6.0, 2.5
"""Aesthetic scores that a refiner is asked for, and moves away from: pipeline_stable_diffusion_xl_img2img.py."""

SCORED, FRAMED = 5, 6
"""How many numbers a refiner takes beside its text, and an SDXL base."""

_OTHERS = ("class_embed_type", "num_class_embeds", "encoder_hid_dim_type", "time_cond_proj_dim")
"""Inputs of other networks of the same class, by the fields of their config."""


@cache
def layer(skipped: int, normed: bool) -> Callable[[Any, torch.Tensor], States]:
    """Return a function that reads the hidden states [B, length, width] of a CLIP without its last `skipped` layers,
    and if it has a projection, the pooled state [B, projection] after all layers.

    normed: whether the CLIP's last norm is applied to them. The function raises InvalidValue: it has too few layers.
    """

    def states(network: Any, ids: torch.Tensor) -> States:
        output = network(ids, output_hidden_states=True)
        if skipped >= len(output.hidden_states):
            most = len(output.hidden_states) - (1 if normed else 2)
            raise InvalidValue(f"clip_skip: this model can leave out 0 to {most} layers", param="clip_skip")
        hidden = output.hidden_states[-1 - skipped]
        pooled = output.get("text_embeds")
        return (network.final_layer_norm(hidden) if normed else hidden, *(() if pooled is None else (pooled,)))

    return states


def read_layer(
    read: Read, which: tuple[int, bool], encoder: Encoder, texts: Sequence[str], length: int, batch: int | None
) -> States:
    """As `read`, but from the layer that `layer(*which)` reads."""
    return read(encoder._replace(states=layer(*which)), texts, length, batch)


class UNet(Family):
    """A U-Net with its VAE and the CLIPs that it was trained with; without any CLIP, all texts are zeros.

    Conditions: `text` [P, card.text.clip, width of the CLIPs together]. Where the config has added conditions (SDXL):
    `pooled` [P, projection of the second CLIP], and `time_ids` float32 [P, FRAMED or SCORED], `Pass.numbers`.
    """

    parts: ClassVar = {
        "unet": ("UNet2DConditionModel",),
        "vae": ("AutoencoderKL",),
        "text_encoder": ("CLIPTextModel",),
        "text_encoder_2": ("CLIPTextModelWithProjection",),
        "tokenizer": CLIP_TOKENIZER,
        "tokenizer_2": CLIP_TOKENIZER,
    }
    reads: ClassVar = {"text_encoder": layer(0, True), "text_encoder_2": layer(1, False)}
    patch = 1

    def _fit(self) -> None:
        config, length = self.config, self.card.text.clip
        configs = {name: encoder.network.config for name, encoder in self.encoders.items() if encoder}
        widths = {name: one.hidden_size for name, one in configs.items()}
        widths = widths or {"text_encoder": config.cross_attention_dim}
        self.shapes: dict[str, list[tuple[int, ...]]] = {name: [(length, width)] for name, width in widths.items()}
        self.added, self.numbers = config.addition_embed_type is not None, 0
        self._check_sizes()
        self._require(
            (config.in_channels, config.out_channels) == (self.channels, self.channels),
            f"the network has {config.in_channels} latent channels, the VAE {self.channels}",
        )
        self._require(
            sum(widths.values()) == config.cross_attention_dim, "the CLIPs are not together as wide as the network"
        )
        self._require(self.added == self.card.framing, f"framing of its card should be {str(self.added).lower()}")
        self._require(not any(config[name] for name in _OTHERS), f"the network takes one of {', '.join(_OTHERS)}")
        if self.added:
            self._fit_added(configs)

    def _fit_added(self, clips: Mapping[str, Any]) -> None:
        """Take the width of the pooled text and the number of `time_ids`. clips: the configs of those that exist."""
        config = self.config
        text, whole = config.cross_attention_dim, config.projection_class_embeddings_input_dim or 0
        each = config.addition_time_embed_dim or 1
        pooled = text if whole - text == SCORED * each else whole - FRAMED * each  # without a CLIP that says it
        if clips:
            pooled = getattr(clips.get("text_encoder_2"), "projection_dim", 0)
        self.numbers, rest = divmod(whole - pooled, each)
        fits = config.addition_embed_type == "text_time" and pooled > 0 and not rest
        self._require(fits and self.numbers in (SCORED, FRAMED), "the network's added conditions are not SDXL's")
        self.shapes[next(reversed(self.shapes))].append((pooled,))

    def passes(self, condition: Condition, recipe: Recipe) -> list[Pass]:
        """As the base class, with the numbers of the recipe's framing.

        NOTE: as in diffusers' pipelines, the CLIPs' last layers are left out for the prompt alone, not for the negative
        prompt, and an absent negative prompt is none at all where the card forces zeros.
        """
        size = recipe.height, recipe.width
        framing = recipe.framing or Framing(size, (0, 0), size)
        own, *others = super().passes(condition, recipe)
        absent = self.card.force_zeros and isinstance(condition, Prompt) and condition.negative is None
        return [
            Pass(own.condition, self._numbers(framing, SCORE), recipe.clip_skip),
            *(Pass(None if absent else one.condition, self._numbers(framing, LOW_SCORE)) for one in others),
        ]

    def _numbers(self, framing: Framing, score: float) -> tuple[float, ...]:
        last = (score,) if self.numbers == SCORED else framing.target
        return (*framing.original, *framing.crop, *last) if self.numbers else ()

    def encode(
        self, passes: Sequence[Pass], text_length: int, batch: int | None = None, read: Read = read_texts
    ) -> Conditions:
        """As the base class; a pass without a condition is zeros."""
        blank = super().blank(text_length).items()
        found = {name: value.repeat(len(passes), *[1] * (value.ndim - 1)) for name, value in blank}
        for skipped in {one.clip_skip for one in passes}:
            at = [i for i, one in enumerate(passes) if one.condition and one.clip_skip == skipped]
            # SDXL was trained on the last layer but one without the norm, the others on the last layer after it.
            own = partial(read_layer, read, (skipped + self.added, not self.added))
            for name, value in super().encode([passes[i] for i in at], text_length, batch, own).items() if at else ():
                found[name][at] = value
        return found | self._time_ids([one.numbers for one in passes])

    def join(self, text_length: int, outputs: Outputs) -> Conditions:
        """As encode_prompt of the pipelines: the hidden states side by side, and the pooled state of the last CLIP."""
        states = [outputs(name, *shapes) for name, shapes in self.shapes.items()]
        text = torch.cat([hidden for hidden, *_ in states], dim=-1)
        return {"text": text, "pooled": states[-1][1]} if self.added else {"text": text}

    def blank(self, text_length: int) -> Conditions:
        """Zeros of the shapes that `encode` gives."""
        return super().blank(text_length) | self._time_ids([(0.0,) * self.numbers])

    def _time_ids(self, numbers: Sequence[tuple[float, ...]]) -> Conditions:
        # NOTE: float32 always. diffusers rounds them to the network's number format: 1023 is 1024 in bfloat16.
        return {"time_ids": torch.tensor(numbers, dtype=torch.float32, device=self.device)} if self.added else {}

    def denoise(self, x: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> Denoised:
        """As the base class; t need not be whole."""
        added = {"text_embeds": conditions["pooled"], "time_ids": conditions["time_ids"]} if self.added else None
        text = conditions["text"]
        out = self.network(x.to(self.dtype), t, text, added_cond_kwargs=added, return_dict=False)[0]
        return out.float(), None
