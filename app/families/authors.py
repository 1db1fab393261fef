"""Authors: the layouts in which the authors of networks publish them, and their tensors by diffusers' names.

A layout is a table of rules. Their names are those of the modules in facebookresearch/DiT models.py,
Stability-AI/sd3.5 mmditx.py, black-forest-labs/flux model.py, and CompVis/latent-diffusion's autoencoder (Stability's
sd3_impls.py and BFL's autoencoder.py have the same).

In the key of a rule, `#` is an index, `$` the highest index in this place, `*` weight or bias, `(a|b)` either word, and
`**` all that is left. In its names, `#`, `*`, `&` and `**` are the index, ending, word and rest as read, in the order
read; `~` is the first index counted from the highest; `%` is every index in the place of the rule's `every`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from math import isqrt

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from app.families.text import State

Tensors = Mapping[str, torch.Tensor]
Change = Callable[[str, torch.Tensor, Tensors], list[torch.Tensor]]
"""(key, tensor, all tensors by the authors' names) -> the tensors of the rule's names. Raises ValueError."""

POSITIONS_TOLERANCE = 1e-2
"""Bound of the error of a stored position embedding, which has sines: bfloat16 keeps them to 4e-3."""

_INDEX = r"(0|[1-9][0-9]{0,3})"
_TOKENS = {"#": _INDEX, "$": _INDEX, "*": r"(weight|bias)", "**": r"(.*)"}


def same(key: str, tensor: torch.Tensor, state: Tensors) -> list[torch.Tensor]:
    """The tensor as it is."""
    return [tensor]


def thirds(key: str, tensor: torch.Tensor, state: Tensors) -> list[torch.Tensor]:
    """Three views of a fused q, k, v."""
    if tensor.ndim not in (1, 2) or tensor.shape[0] % 3 or not tensor.shape[0]:
        raise ValueError(f"{key} has shape {list(tensor.shape)}, which does not split into q, k and v")
    return list(tensor.chunk(3))


def fused(key: str, tensor: torch.Tensor, state: Tensors) -> list[torch.Tensor]:
    """Views of FLUX's fused q, k, v and MLP: three times the width, then what is left."""
    width = state["img_in.weight"].shape[0] if "img_in.weight" in state else 0
    rest = tensor.shape[0] - 3 * width if tensor.ndim in (1, 2) else 0
    if width < 1 or rest < 1:
        raise ValueError(f"{key} has shape {list(tensor.shape)}, which does not split into q, k, v and the MLP")
    return list(torch.split(tensor, [width, width, width, rest]))


def swapped(key: str, tensor: torch.Tensor, state: Tensors) -> list[torch.Tensor]:
    """A copy of (shift, scale) as (scale, shift)."""
    if tensor.ndim not in (1, 2) or tensor.shape[0] % 2 or not tensor.shape[0]:
        raise ValueError(f"{key} has shape {list(tensor.shape)}, which does not split into shift and scale")
    shift, scale = tensor.chunk(2)
    return [torch.cat((scale, shift))]


def matrix(key: str, tensor: torch.Tensor, state: Tensors) -> list[torch.Tensor]:
    """A view of a convolution of one pixel as a linear layer."""
    if tensor.ndim == 4 and tensor.shape[2:] != (1, 1):
        raise ValueError(f"{key} has shape {list(tensor.shape)}, which is not a convolution of one pixel")
    return [tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor]


def positions(key: str, tensor: torch.Tensor, state: Tensors) -> list[torch.Tensor]:
    """Nothing: the network computes its position embedding, from which a stored one must not differ."""
    side = isqrt(tensor.shape[1]) if tensor.ndim == 3 else 0
    if tensor.ndim != 3 or tensor.shape[0] != 1 or side**2 != tensor.shape[1] or not side or tensor.shape[2] % 4:
        raise ValueError(f"{key} has shape {list(tensor.shape)}, not [1, side * side, width]")
    if not tensor.is_meta:
        computed = torch.as_tensor(get_2d_sincos_pos_embed(tensor.shape[2], side, base_size=side, output_type="pt"))
        if not (tensor[0].float() - computed.float()).abs().max() <= POSITIONS_TOLERANCE:
            raise ValueError(f"{key} is not the sines and cosines of {side} by {side} places that the network computes")
    return []


@dataclass(frozen=True, slots=True)
class Rule:
    """What `key` becomes: nothing, one tensor for each of `names`, or one for every index in the place of `every`."""

    key: str
    names: tuple[str, ...]
    change: Change = same
    every: str = ""

    def pattern(self) -> re.Pattern[str]:
        """The names that this rule reads; groups are indices, words and endings."""
        pieces = re.split(r"(\*\*|[#$*]|\(.*?\))", self.key)
        return re.compile("".join(_TOKENS.get(one) or (one if one[:1] == "(" else re.escape(one)) for one in pieces))


def rule(key: str, *names: str, change: Change = same, every: str = "") -> Rule:
    """A rule that renames or splits a tensor; without names it drops it."""
    return Rule(key, names, change, every)


def apply(rules: Iterable[Rule], state: Tensors) -> State:
    """The state by the names that the rules give: views, but for what is swapped. On the meta device too.

    Raises ValueError naming the key: one that no rule reads, a shape that cannot be split, two tensors of one name.
    """
    compiled = [(one, one.pattern()) for one in rules]
    found: State = {}
    last: dict[str, int] = {}
    for key, tensor in state.items():
        one, match = _rule(compiled, key, state, last)
        changed = one.change(key, tensor, state)
        for name, piece in zip(one.names, changed, strict=bool(one.names)):
            for full in _named(one, name, match, state, last):
                if full in found:
                    raise ValueError(f"{key}: {full} stands in the file twice")
                found[full] = piece
    return found


def _rule(
    rules: list[tuple[Rule, re.Pattern[str]]], key: str, state: Tensors, last: dict[str, int]
) -> tuple[Rule, re.Match[str]]:
    """The first rule that reads this key."""
    for one, pattern in rules:
        match = pattern.fullmatch(key)
        head, marked, _ = one.key.partition("$")
        if match and (not marked or int(match[1]) == _highest(head, state, last)):
            return one, match
    raise ValueError(f"unexpected weights: {key}")


def _named(one: Rule, name: str, match: re.Match[str], state: Tensors, last: dict[str, int]) -> Iterator[str]:
    read = iter(match.groups())
    if "~" in name:
        name = name.replace("~", str(_highest(one.key.partition("#")[0], state, last) - int(next(read))))
    named = re.sub(r"\*\*|[#*&]", lambda _: next(read), name)
    if "%" not in named:
        yield named
        return
    for index in range(_highest(one.every, state, last) + 1):
        yield named.replace("%", str(index))


def _highest(head: str, state: Tensors, last: dict[str, int]) -> int:
    """The highest index after `head` in the names of the state; counted once. Raises ValueError: indices are left out,
    which would also let a name ask for any number of copies."""
    if head not in last:
        pattern = re.compile(re.escape(head) + _INDEX + r"\.")
        indices = {int(match[1]) for key in state if (match := pattern.match(key))}
        if indices != set(range(len(indices))):
            absent = min(set(range(len(indices))) - indices)
            raise ValueError(f"missing weights: {head}{absent}, though it has {head}{max(indices)}")
        last[head] = len(indices) - 1
    return last[head]


def _qkv(name: str) -> tuple[str, ...]:
    return tuple(name.format(part) for part in "qkv")


_EMBEDDER = "transformer_blocks.%.norm1.emb"
DIT = (
    rule("x_embedder.proj.*", "pos_embed.proj.*"),
    rule("pos_embed", change=positions),
    rule("t_embedder.mlp.0.*", f"{_EMBEDDER}.timestep_embedder.linear_1.*", every="blocks."),
    rule("t_embedder.mlp.2.*", f"{_EMBEDDER}.timestep_embedder.linear_2.*", every="blocks."),
    rule("y_embedder.embedding_table.weight", f"{_EMBEDDER}.class_embedder.embedding_table.weight", every="blocks."),
    rule("blocks.#.adaLN_modulation.1.*", "transformer_blocks.#.norm1.linear.*"),
    rule("blocks.#.attn.qkv.*", *_qkv("transformer_blocks.#.attn1.to_{}.*"), change=thirds),
    rule("blocks.#.attn.proj.*", "transformer_blocks.#.attn1.to_out.0.*"),
    rule("blocks.#.mlp.fc1.*", "transformer_blocks.#.ff.net.0.proj.*"),
    rule("blocks.#.mlp.fc2.*", "transformer_blocks.#.ff.net.2.*"),
    rule("final_layer.adaLN_modulation.1.*", "proj_out_1.*"),
    rule("final_layer.linear.*", "proj_out_2.*"),
)

_IMAGE, _TEXT, _JOINT = "joint_blocks.#.x_block", "joint_blocks.#.context_block", "transformer_blocks.#"
SD3 = (
    rule("x_embedder.proj.*", "pos_embed.proj.*"),
    rule("pos_embed", "pos_embed.pos_embed"),
    rule("context_embedder.*", "context_embedder.*"),
    rule("t_embedder.mlp.0.*", "time_text_embed.timestep_embedder.linear_1.*"),
    rule("t_embedder.mlp.2.*", "time_text_embed.timestep_embedder.linear_2.*"),
    rule("y_embedder.mlp.0.*", "time_text_embed.text_embedder.linear_1.*"),
    rule("y_embedder.mlp.2.*", "time_text_embed.text_embedder.linear_2.*"),
    rule(f"{_IMAGE}.(attn|attn2).qkv.*", *_qkv(f"{_JOINT}.&.to_{{}}.*"), change=thirds),
    rule(f"{_IMAGE}.(attn|attn2).ln_(q|k).weight", f"{_JOINT}.&.norm_&.weight"),
    rule(f"{_IMAGE}.(attn|attn2).proj.*", f"{_JOINT}.&.to_out.0.*"),
    rule(f"{_TEXT}.attn.qkv.*", *_qkv(f"{_JOINT}.attn.add_{{}}_proj.*"), change=thirds),
    rule(f"{_TEXT}.attn.ln_(q|k).weight", f"{_JOINT}.attn.norm_added_&.weight"),
    rule(f"{_TEXT}.attn.proj.*", f"{_JOINT}.attn.to_add_out.*"),
    rule(f"{_IMAGE}.adaLN_modulation.1.*", f"{_JOINT}.norm1.linear.*"),
    # The last block ends the text: its modulation is a final one, of which diffusers swaps the halves.
    rule("joint_blocks.$.context_block.adaLN_modulation.1.*", f"{_JOINT}.norm1_context.linear.*", change=swapped),
    rule(f"{_TEXT}.adaLN_modulation.1.*", f"{_JOINT}.norm1_context.linear.*"),
    rule(f"{_IMAGE}.mlp.fc1.*", f"{_JOINT}.ff.net.0.proj.*"),
    rule(f"{_IMAGE}.mlp.fc2.*", f"{_JOINT}.ff.net.2.*"),
    rule(f"{_TEXT}.mlp.fc1.*", f"{_JOINT}.ff_context.net.0.proj.*"),
    rule(f"{_TEXT}.mlp.fc2.*", f"{_JOINT}.ff_context.net.2.*"),
    rule("final_layer.adaLN_modulation.1.*", "norm_out.linear.*", change=swapped),
    rule("final_layer.linear.*", "proj_out.*"),
)

_DOUBLE, _SINGLE = "double_blocks.#", "single_transformer_blocks.#"
FLUX = (
    rule("img_in.*", "x_embedder.*"),
    rule("txt_in.*", "context_embedder.*"),
    rule("time_in.in_layer.*", "time_text_embed.timestep_embedder.linear_1.*"),
    rule("time_in.out_layer.*", "time_text_embed.timestep_embedder.linear_2.*"),
    rule("vector_in.in_layer.*", "time_text_embed.text_embedder.linear_1.*"),
    rule("vector_in.out_layer.*", "time_text_embed.text_embedder.linear_2.*"),
    rule("guidance_in.in_layer.*", "time_text_embed.guidance_embedder.linear_1.*"),
    rule("guidance_in.out_layer.*", "time_text_embed.guidance_embedder.linear_2.*"),
    rule(f"{_DOUBLE}.img_mod.lin.*", f"{_JOINT}.norm1.linear.*"),
    rule(f"{_DOUBLE}.img_attn.qkv.*", *_qkv(f"{_JOINT}.attn.to_{{}}.*"), change=thirds),
    rule(f"{_DOUBLE}.img_attn.norm.query_norm.scale", f"{_JOINT}.attn.norm_q.weight"),
    rule(f"{_DOUBLE}.img_attn.norm.key_norm.scale", f"{_JOINT}.attn.norm_k.weight"),
    rule(f"{_DOUBLE}.img_attn.proj.*", f"{_JOINT}.attn.to_out.0.*"),
    rule(f"{_DOUBLE}.img_mlp.0.*", f"{_JOINT}.ff.net.0.proj.*"),
    rule(f"{_DOUBLE}.img_mlp.2.*", f"{_JOINT}.ff.net.2.*"),
    rule(f"{_DOUBLE}.txt_mod.lin.*", f"{_JOINT}.norm1_context.linear.*"),
    rule(f"{_DOUBLE}.txt_attn.qkv.*", *_qkv(f"{_JOINT}.attn.add_{{}}_proj.*"), change=thirds),
    rule(f"{_DOUBLE}.txt_attn.norm.query_norm.scale", f"{_JOINT}.attn.norm_added_q.weight"),
    rule(f"{_DOUBLE}.txt_attn.norm.key_norm.scale", f"{_JOINT}.attn.norm_added_k.weight"),
    rule(f"{_DOUBLE}.txt_attn.proj.*", f"{_JOINT}.attn.to_add_out.*"),
    rule(f"{_DOUBLE}.txt_mlp.0.*", f"{_JOINT}.ff_context.net.0.proj.*"),
    rule(f"{_DOUBLE}.txt_mlp.2.*", f"{_JOINT}.ff_context.net.2.*"),
    rule("single_blocks.#.modulation.lin.*", f"{_SINGLE}.norm.linear.*"),
    rule("single_blocks.#.linear1.*", *_qkv(f"{_SINGLE}.attn.to_{{}}.*"), f"{_SINGLE}.proj_mlp.*", change=fused),
    rule("single_blocks.#.norm.query_norm.scale", f"{_SINGLE}.attn.norm_q.weight"),
    rule("single_blocks.#.norm.key_norm.scale", f"{_SINGLE}.attn.norm_k.weight"),
    rule("single_blocks.#.linear2.*", f"{_SINGLE}.proj_out.*"),
    rule("final_layer.adaLN_modulation.1.*", "norm_out.linear.*", change=swapped),
    rule("final_layer.linear.*", "proj_out.*"),
)

_RESNET, _HALF, _ATTENTION = "(norm1|conv1|norm2|conv2).*", "(encoder|decoder)", "&.mid_block.attentions.0"
VAE = (
    rule(f"{_HALF}.(conv_in|conv_out).*", "&.&.*"),
    rule(f"{_HALF}.norm_out.*", "&.conv_norm_out.*"),
    rule(f"{_HALF}.mid.block_1.{_RESNET}", "&.mid_block.resnets.0.&.*"),
    rule(f"{_HALF}.mid.block_2.{_RESNET}", "&.mid_block.resnets.1.&.*"),
    rule(f"{_HALF}.mid.block_1.nin_shortcut.*", "&.mid_block.resnets.0.conv_shortcut.*"),
    rule(f"{_HALF}.mid.block_2.nin_shortcut.*", "&.mid_block.resnets.1.conv_shortcut.*"),
    rule(f"{_HALF}.mid.attn_1.norm.*", f"{_ATTENTION}.group_norm.*"),
    rule(f"{_HALF}.mid.attn_1.(q|k|v).*", f"{_ATTENTION}.to_&.*", change=matrix),
    rule(f"{_HALF}.mid.attn_1.proj_out.*", f"{_ATTENTION}.to_out.0.*", change=matrix),
    rule(f"encoder.down.#.block.#.{_RESNET}", "encoder.down_blocks.#.resnets.#.&.*"),
    rule("encoder.down.#.block.#.nin_shortcut.*", "encoder.down_blocks.#.resnets.#.conv_shortcut.*"),
    rule("encoder.down.#.downsample.conv.*", "encoder.down_blocks.#.downsamplers.0.conv.*"),
    rule(f"decoder.up.#.block.#.{_RESNET}", "decoder.up_blocks.~.resnets.#.&.*"),
    rule("decoder.up.#.block.#.nin_shortcut.*", "decoder.up_blocks.~.resnets.#.conv_shortcut.*"),
    rule("decoder.up.#.upsample.conv.*", "decoder.up_blocks.~.upsamplers.0.conv.*"),
    rule("(quant_conv|post_quant_conv).*", "&.*"),
    rule("loss.**"),
    rule("model_ema.**"),
)

# The text encoders have transformers' names already. Of SD3's CLIP-L the authors' code (sd3_infer.py) takes the pooled
# state before any projection; diffusers, which always projects, gets the identity.
TEXT = (rule("**", "**"),)
CLIP_L = (rule("text_projection.weight"), rule("logit_scale"), *TEXT)


@dataclass(frozen=True, slots=True)
class Layout:
    """One part as its authors' files name it.

    parts: its names in a model_index.json. classes: it may have. prefixes: that files put before its names. signs:
    names that all of its files have, and no other layout's. family: of a transformer. prefix: in the file at hand.
    """

    name: str
    parts: tuple[str, ...]
    classes: tuple[str, ...]
    prefixes: tuple[str, ...]
    signs: tuple[str, ...]
    rules: tuple[Rule, ...]
    family: str | None = None
    prefix: str = ""

    def within(self, keys: Collection[str]) -> Layout | None:
        """This layout with the prefix that it has among these names of a file; None if it is not among them."""
        for prefix in self.prefixes:
            if all(prefix + sign in keys for sign in self.signs):
                return replace(self, prefix=prefix)
        return None

    def read(self, class_name: str, state: Tensors) -> State:
        """The part's tensors by diffusers' names, from all tensors of the file; other parts are left alone.

        Views, but for what diffusers has in another order. Raises ValueError naming the key.
        """
        own = {key[len(self.prefix) :]: value for key, value in state.items() if key.startswith(self.prefix)}
        try:
            found = apply(self.rules, own)
        except ValueError as error:
            after = f" after {self.prefix}" if self.prefix else ""
            raise ValueError(f"{error!s:.400} (in the layout of {self.name}{after})") from error
        norm = found.get("text_model.final_layer_norm.weight")
        unprojected = class_name == "CLIPTextModelWithProjection" and "text_projection.weight" not in found
        if unprojected and norm is not None and norm.ndim == 1:
            found["text_projection.weight"] = torch.eye(norm.shape[0], dtype=norm.dtype, device=norm.device)
        return found


_CLIPS, _DITS = ("CLIPTextModel", "CLIPTextModelWithProjection"), ("DiTTransformer2DModel", "Transformer2DModel")
_NETWORK, _UNET, _WORDS = ("transformer",), "model.diffusion_model.", "text_model.embeddings.token_embedding.weight"
_DIT_SIGNS = ("y_embedder.embedding_table.weight", "blocks.0.attn.qkv.weight")
_SD3_SIGNS = ("joint_blocks.0.x_block.attn.qkv.weight",)
_FLUX_SIGNS = ("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight")
_VAE_SIGNS = ("decoder.mid.block_1.conv1.weight",)
_T5_SIGNS = ("encoder.block.0.layer.0.SelfAttention.q.weight",)
_VAE_PREFIXES, _T5_PREFIXES = ("first_stage_model.", "vae.", ""), ("text_encoders.t5xxl.transformer.", "")
LAYOUTS = (
    Layout("DiT", _NETWORK, _DITS, ("",), _DIT_SIGNS, DIT, "dit"),
    Layout("SD3", _NETWORK, ("SD3Transformer2DModel",), (_UNET, ""), _SD3_SIGNS, SD3, "sd3"),
    Layout("FLUX", _NETWORK, ("FluxTransformer2DModel",), ("", _UNET), _FLUX_SIGNS, FLUX, "flux"),
    Layout("VAE", ("vae",), ("AutoencoderKL",), _VAE_PREFIXES, _VAE_SIGNS, VAE),
    Layout("CLIP-L", ("text_encoder",), _CLIPS, ("text_encoders.clip_l.transformer.",), (_WORDS,), CLIP_L),
    Layout("CLIP-G", ("text_encoder_2",), _CLIPS, ("text_encoders.clip_g.transformer.",), (_WORDS,), TEXT),
    Layout("CLIP", ("text_encoder", "text_encoder_2"), _CLIPS, ("",), (_WORDS,), TEXT),
    Layout("T5", ("text_encoder_3", "text_encoder_2"), ("T5EncoderModel",), _T5_PREFIXES, _T5_SIGNS, TEXT),
)


def parts_in(keys: Collection[str]) -> dict[str, Layout]:
    """The parts that a file with these names holds, by their names in a model_index.json.

    FLUX's T5 is text_encoder_2 where the file also holds its transformer; one alone is text_encoder_3, and a CLIP
    alone text_encoder.
    """
    held = [found for layout in LAYOUTS if (found := layout.within(keys)) is not None]
    flux = any(one.family == "flux" for one in held)
    return {one.parts[-1 if flux and one.name == "T5" else 0]: one for one in reversed(held)}


def find_part(part: str, class_name: str, keys: Collection[str]) -> Layout:
    """The layout of this part of this class in a file with these names. Raises ValueError: says what the file holds."""
    for layout in LAYOUTS:
        if part in layout.parts and class_name in layout.classes and (found := layout.within(keys)) is not None:
            return found
    others = sorted(f"{name} ({one.name})" for name, one in parts_in(keys).items())
    held = f"it holds {', '.join(others)}" if others else "no part of a known layout is in it"
    raise ValueError(f"no {part} of class {class_name}: {held}")


def from_original(class_name: str, state: Tensors, part: str = "transformer") -> State:
    """The tensors of one part by diffusers' names, from all tensors of a file in its authors' layout.

    part: its name in a model_index.json. Views, but for what diffusers has in another order; on the meta device too.
    Raises ValueError naming the key, or what the file holds.
    """
    return find_part(part, class_name, state.keys()).read(class_name, state)
