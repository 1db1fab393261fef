"""Family: a network with its text encoders and VAE, as the engine sees them; what the families share."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar

import torch

from app.cards.card import Card
from app.errors import CheckpointError, EngineError
from app.families import vae
from app.families.text import Cut, Encoder, Read, States, cut_text, prompt_text, read_texts, t5_states
from app.report import Phase
from app.request import Condition, Pass, Prompt, Recipe

Conditions = dict[str, torch.Tensor]
"""Tensors by name, first axis = passes; what one pass needs besides its latent and timestep."""

Denoised = tuple[torch.Tensor, torch.Tensor | None]
"""(out, frac) of a forward: see `Family.denoise`."""

Outputs = Callable[..., States]
"""(name of a text encoder, the shapes of its outputs for one text) -> its outputs for all texts, or zeros."""

CLIP_TOKENIZER = ("CLIPTokenizer", "CLIPTokenizerFast")
T5_TOKENIZER = ("T5Tokenizer", "T5TokenizerFast")


class Family(ABC):
    """A model of one kind of network, in eval mode on one device, described by one card.

    It is built before its weights are there (the pool brings them, phase by phase), so the constructor reads configs
    only. Every method runs under the caller's `torch.inference_mode()`, on the thread that owns the device; only the
    constructor and `prepare` run on the loader's. `encode`, `denoise` and `decode` need the parts of that phase.
    """

    parts: ClassVar[Mapping[str, tuple[str, ...]]]
    """The classes that each part may have, by its name in model_index.json; the first part is the network."""
    reads: ClassVar[Mapping[str, Callable[[Any, torch.Tensor], States]]] = {}
    """The functions that run the text encoders, by the encoders' names in model_index.json."""
    required: ClassVar[tuple[str, ...]]
    """The parts that the model cannot do without."""
    phases: ClassVar[Mapping[Phase, tuple[str, ...]]]
    """Names of the parts with weights that each phase needs on the device."""
    patch: int
    """Latent pixels along a side of one image token."""
    learned_variance = False
    """Whether `denoise` returns frac, the learned-range interpolation of a DiT's variance channels."""

    card: Card
    network: Any
    """The denoising network, a torch module."""
    device: torch.device
    dtype: torch.dtype

    def __init_subclass__(cls) -> None:
        cls.required = (next(iter(cls.parts)), "vae")
        cls.phases = {"encode": tuple(cls.reads), "denoise": cls.required[:1], "decode": ("vae",)}

    def __init__(self, card: Card, parts: Mapping[str, Any], device: torch.device | str, dtype: torch.dtype) -> None:
        """parts: built components by their names in model_index.json. Raises CheckpointError: they do not fit."""
        self.card, self.device, self.dtype = card, torch.device(device), dtype
        self.network, self.vae = parts[self.required[0]], parts["vae"]
        self.config = self.network.config
        self.channels: int = self.vae.config.latent_channels
        self.scale = vae.pixels_per_latent(self.vae)
        self.encoders = {name: self._encoder(parts, name) for name in self.reads}
        self._fit()

    @abstractmethod
    def _fit(self) -> None:
        """Take what it needs from the parts' configs. Raises CheckpointError: they do not fit."""

    @staticmethod
    def traits(card: Card, part: str) -> tuple[float | None, ...]:
        """The facts of a card that change a part itself: cards that differ in them cannot share the built part."""
        return ()

    def latent_shape(self, width: int, height: int) -> tuple[int, int, int]:
        """(channels, height, width) of the latent of an image of width x height pixels."""
        return self.channels, height // self.scale, width // self.scale

    def image_tokens(self, width: int, height: int) -> int:
        """Number of image tokens, which resolution-dependent shift is a function of."""
        _, rows, columns = self.latent_shape(width, height)
        return (rows // self.patch) * (columns // self.patch)

    def opposite(self, condition: Condition) -> Condition:
        """The condition that guidance moves away from: the negative prompt as a prompt, or the null class."""
        return Prompt((condition.negative or "") if isinstance(condition, Prompt) else "")

    def passes(self, condition: Condition, recipe: Recipe) -> list[Pass]:
        """The passes of a line of an image: its own, and where it is guided the one that guidance moves away from."""
        own = Prompt(condition.text) if isinstance(condition, Prompt) else condition
        return [Pass(own), Pass(self.opposite(condition))] if recipe.guidance.guided else [Pass(own)]

    def encode(
        self, passes: Sequence[Pass], text_length: int, batch: int | None = None, read: Read = read_texts
    ) -> Conditions:
        """Conditions for these passes, in order; `Prompt.negative` is not read here.

        text_length: padded length of the longest encoder (T5) in tokens. batch: pad every encoder forward to this
        fixed batch size (deterministic mode); None runs one forward of all texts. read: returns the encoders' outputs,
        from a cache or by running them. Raises InvalidValue for a condition of the wrong kind.
        """
        texts = [prompt_text(one.condition) for one in passes]

        def outputs(name: str, *shapes: tuple[int, ...]) -> States:
            encoder, length = self.encoders[name], self._length(name, text_length)
            states = read(encoder, texts, length, batch) if encoder else self._zeros(len(texts), *shapes)
            return tuple(state.to(self.dtype) for state in states)

        return self.join(text_length, outputs)

    def join(self, text_length: int, outputs: Outputs) -> Conditions:
        """Conditions from the outputs of the text encoders; a family without any has its own `encode` and `blank`."""
        raise NotImplementedError

    def blank(self, text_length: int) -> Conditions:
        """Conditions of one pass with the right shapes and formats and no meaning, for measuring."""
        return self.join(text_length, lambda name, *shapes: self._zeros(1, *shapes))

    def truncated(self, condition: Condition | None, text_length: int, cut: Cut = cut_text) -> str | None:
        """The end of the prompt that no encoder sees, as the user wrote it; None for a label, or when one sees all."""
        cuts = [
            cut(encoder.tokenizer, prompt_text(condition), self._length(name, text_length))
            for name, encoder in self.encoders.items()
            if encoder
        ]
        return min(cuts, key=len, default="") or None

    @abstractmethod
    def denoise(self, x: torch.Tensor, t: torch.Tensor, conditions: Conditions) -> Denoised:
        """One forward of P passes.

        x: [P, C, h, w] float32, already scaled by c_in. t: [P] float32, as the network was trained (0..1000).
        Returns (out [P, C, h, w] float32, frac [P, C, h, w] float32 in [0, 1], or None without learned variance).
        """

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """latents [B, C, h, w] float32, as the sampler leaves them -> uint8 [B, H, W, 3] on the same device.

        The maths of diffusers' pipelines: z = latents / scaling_factor + shift_factor, either of which a config may
        leave out. Raises EngineError when any image of the batch comes out as numbers that are not finite.
        """
        z = latents / (self.vae.config.scaling_factor or 1.0) + (self.vae.config.shift_factor or 0.0)
        return to_pixels(self.vae.decode(z.to(self.vae.dtype), return_dict=False)[0].float())

    def posterior(self, pixels: torch.Tensor) -> torch.Tensor:
        """uint8 [B, H, W, 3] -> float32 [B, 2, C, h, w]: mean and deviation of the latents that show these pictures.

        The maths of diffusers' pipelines: (z - shift_factor) * scaling_factor. Needs the VAE. Raises EngineError when
        any number of the batch is not finite.
        """
        image = pixels.to(self.device).permute(0, 3, 1, 2).float() / 127.5 - 1
        z = self.vae.encode(image.to(self.vae.dtype), return_dict=False)[0]
        shift, scale = self.vae.config.shift_factor or 0.0, self.vae.config.scaling_factor or 1.0
        both = torch.stack([(z.mean.float() - shift) * scale, z.std.float() * scale], 1)
        if not torch.isfinite(both).all():
            raise EngineError("the encoder returned numbers that are not finite", code="non_finite_output")
        return both

    def prepare(self) -> None:
        """Fit the linear map of `preview` to the VAE, whose weights must be there."""
        vae.linear_map(self.vae)

    def preview(self, latents: torch.Tensor) -> torch.Tensor:
        """A quick look at predicted clean latents, much cheaper than `decode`; same shapes, same error."""
        return to_pixels(vae.preview(self.vae, latents))

    def _require(self, fits: Any, problem: str) -> None:
        """Raises CheckpointError with the card and the problem, unless it `fits`."""
        if not fits:
            raise CheckpointError(f"{self.card.file}: {problem}")

    def _check_sizes(self) -> None:
        """Raises CheckpointError: the card has sizes that are no whole number of the network's patches."""
        sizes, cell = self.card.limits.sizes, self.scale * self.patch
        for name, pixels in (("multiple", sizes.multiple), ("min", sizes.min)):
            self._require(pixels % cell == 0, f"limits.sizes.{name}: not a multiple of the network's patches")

    def _encoder(self, parts: Mapping[str, Any], name: str) -> Encoder | None:
        """A text encoder with its tokenizer; None for an absent one. Raises CheckpointError: they do not fit."""
        tokenizer = name.replace("text_encoder", "tokenizer")
        if parts.get(name) is None:
            return None
        if parts.get(tokenizer) is None:
            raise CheckpointError(f"{self.card.id}: {name} needs a {tokenizer}")
        config = parts[name].config
        if self.reads[name] is t5_states:
            self._require(config.d_model == self.config.joint_attention_dim, "the T5 is not as wide as the network")
        else:
            fits = self.card.text.clip <= config.max_position_embeddings
            self._require(fits, "text.clip: longer than the CLIP's position table")
        return Encoder(parts[name], parts[tokenizer], self.reads[name])

    def _length(self, name: str, text_length: int) -> int:
        """The padded length of a text encoder in tokens."""
        return text_length if self.reads[name] is t5_states else self.card.text.clip

    def _zeros(self, count: int, *shapes: tuple[int, ...]) -> States:
        return tuple(torch.zeros((count, *shape), device=self.device, dtype=self.dtype) for shape in shapes)


def to_pixels(image: torch.Tensor) -> torch.Tensor:
    """image [B, 3, H, W] in -1..1 -> uint8 [B, H, W, 3], rounded as diffusers' pipelines round.

    Raises EngineError when any number of the batch is not finite; rounding would turn it into a black picture.
    """
    if not torch.isfinite(image).all():
        raise EngineError("the decoder returned numbers that are not finite", code="non_finite_output")
    pixels: torch.Tensor = ((image / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return pixels.permute(0, 2, 3, 1).contiguous()
