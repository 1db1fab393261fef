"""Originals: which parts a file in its authors' own layout holds, and their tensors by diffusers' names.

Knows nothing of files: it is given names and tensors, which may be on the meta device.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass

import torch

from app.families import originals_tables as tables
from app.families.originals_rules import Rule, Tensors, apply

State = dict[str, torch.Tensor]

_UNET = "model.diffusion_model."
_CLIP = ("CLIPTextModel", "CLIPTextModelWithProjection")
_DIT = ("DiTTransformer2DModel", "Transformer2DModel")


@dataclass(frozen=True, slots=True)
class Layout:
    """One part as its authors' files name it.

    parts: what it may be in a model_index.json. prefixes: what may stand before its names. signs: names that all of
    its files hold, and no other layout's. family: of the model whose transformer it is.
    """

    name: str
    parts: tuple[str, ...]
    classes: tuple[str, ...]
    prefixes: tuple[str, ...]
    signs: tuple[str, ...]
    rules: tuple[Rule, ...]
    family: str | None = None


_WORDS = "text_model.embeddings.token_embedding.weight"
LAYOUTS = (
    Layout(
        "DiT",
        ("transformer",),
        _DIT,
        ("",),
        ("y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight"),
        tables.DIT,
        "dit",
    ),
    Layout(
        "SD3",
        ("transformer",),
        ("SD3Transformer2DModel",),
        (_UNET, ""),
        ("joint_blocks.0.x_block.attn.qkv.weight",),
        tables.SD3,
        "sd3",
    ),
    Layout(
        "FLUX",
        ("transformer",),
        ("FluxTransformer2DModel",),
        ("", _UNET),
        ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"),
        tables.FLUX,
        "flux",
    ),
    Layout(
        "VAE",
        ("vae",),
        ("AutoencoderKL",),
        ("first_stage_model.", "vae.", ""),
        ("decoder.mid.block_1.conv1.weight",),
        tables.VAE,
    ),
    Layout("CLIP-L", ("text_encoder",), _CLIP, ("text_encoders.clip_l.transformer.",), (_WORDS,), tables.CLIP_L),
    Layout("CLIP-G", ("text_encoder_2",), _CLIP, ("text_encoders.clip_g.transformer.",), (_WORDS,), tables.TEXT),
    Layout("CLIP", ("text_encoder", "text_encoder_2"), _CLIP, ("",), (_WORDS,), tables.TEXT),
    Layout(
        "T5",
        ("text_encoder_3", "text_encoder_2"),
        ("T5EncoderModel",),
        ("text_encoders.t5xxl.transformer.", ""),
        ("encoder.block.0.layer.0.SelfAttention.q.weight",),
        tables.TEXT,
    ),
)


@dataclass(frozen=True, slots=True)
class Held:
    """A part that a file holds: its layout, and what stands before its names there."""

    layout: Layout
    prefix: str

    def read(self, class_name: str, state: Tensors) -> State:
        """The part's tensors by diffusers' names, from all tensors of the file; other parts are left alone.

        Views, but for what diffusers has in another order. Raises ValueError naming the key.
        """
        own = {key[len(self.prefix) :]: value for key, value in state.items() if key.startswith(self.prefix)}
        try:
            found = apply(self.layout.rules, own)
        except ValueError as error:
            after = f" after {self.prefix}" if self.prefix else ""
            raise ValueError(f"{error!s:.400} (in the layout of {self.layout.name}{after})") from error
        return tables.identity_projection(found) if class_name == "CLIPTextModelWithProjection" else found


def parts_in(keys: Collection[str]) -> dict[str, Held]:
    """The parts that a file with these names holds, by their names in a model_index.json.

    FLUX's T5 is text_encoder_2 where the file also holds its transformer; one alone is text_encoder_3, and a CLIP
    alone text_encoder.
    """
    held = [found for layout in LAYOUTS if (found := _held(layout, keys)) is not None]
    flux = any(one.layout.family == "flux" for one in held)
    return {one.layout.parts[-1 if flux and one.layout.name == "T5" else 0]: one for one in reversed(held)}


def find_part(part: str, class_name: str, keys: Collection[str]) -> Held:
    """The part that is to be this one of this class. Raises ValueError: the file holds none; says what it holds."""
    for layout in LAYOUTS:
        if part in layout.parts and class_name in layout.classes and (found := _held(layout, keys)) is not None:
            return found
    others = sorted(f"{name} ({one.layout.name})" for name, one in parts_in(keys).items())
    held = f"it holds {', '.join(others)}" if others else "no part of a known layout is in it"
    raise ValueError(f"no {part} of class {class_name}: {held}")


def from_original(class_name: str, state: Tensors, part: str = "transformer") -> State:
    """The tensors of one part by diffusers' names, from those of a file in its authors' layout.

    state: all tensors of the file, which may be on the meta device. part: its name in a model_index.json. Views of
    them, but for what diffusers has in another order. Raises ValueError naming the key, or what the file holds.
    """
    return find_part(part, class_name, state.keys()).read(class_name, state)


def _held(layout: Layout, keys: Collection[str]) -> Held | None:
    for prefix in layout.prefixes:
        if all(prefix + sign in keys for sign in layout.signs):
            return Held(layout, prefix)
    return None
