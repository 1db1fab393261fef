"""Authors: the layouts in which the authors of networks publish them, and their tensors by diffusers' names.

A layout is a table of rules. Their names are those of the modules in facebookresearch/DiT models.py,
Stability-AI/sd3.5 mmditx.py, black-forest-labs/flux model.py, and CompVis/latent-diffusion's autoencoder (Stability's
sd3_impls.py and BFL's autoencoder.py have the same).

In the key of a rule, `#` is an index, `$` the highest index in this place, `*` weight or bias, `(a|b)` either word, and
`**` all that is left. In its names, `#`, `*`, `&` and `**` are the index, ending, word and rest as read, in the order
read; `~` is the first index counted from the highest; `%` is every index of the authors' `blocks.`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from math import isqrt

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from app.families.text import State

Tensors = Mapping[str, torch.Tensor]
Change = Callable[[torch.Tensor, Tensors], Iterable[torch.Tensor]]
"""(tensor, all tensors by the authors' names) -> the tensors of the rule's names. Raises when the shape is wrong."""

Rule = tuple[str, tuple[str, ...], Change | None]
"""A key, the names that its tensor gets, and how it is changed; None: it stays as it is."""

POSITIONS_TOLERANCE = 1e-2
"""Bound of the error of a stored position embedding, which has sines: bfloat16 keeps them to 4e-3."""

_INDEX = r"(0|[1-9][0-9]{0,3})"
_TOKENS = {"#": _INDEX, "$": _INDEX, "*": r"(weight|bias)", "**": r"(.*)"}


def thirds(tensor: torch.Tensor, state: Tensors) -> Iterable[torch.Tensor]:
    """Three views of a fused q, k, v."""
    return tensor.reshape(3, -1, *tensor.shape[1:]).unbind()


def fused(tensor: torch.Tensor, state: Tensors) -> Iterable[torch.Tensor]:
    """Views of FLUX's fused q, k, v and MLP: three times the width, then at least one row that is left."""
    width = state["img_in.weight"].shape[0]
    return torch.split(tensor, [width, width, width, max(tensor.shape[0] - 3 * width, 1)])


def swapped(tensor: torch.Tensor, state: Tensors) -> Iterable[torch.Tensor]:
    """A copy of (shift, scale) as (scale, shift)."""
    return (tensor.reshape(2, -1, *tensor.shape[1:]).flip(0).flatten(0, 1),)


def matrix(tensor: torch.Tensor, state: Tensors) -> Iterable[torch.Tensor]:
    """A view of a convolution of one pixel as a linear layer."""
    return (tensor.view(tensor.shape[:2]),)


def positions(tensor: torch.Tensor, state: Tensors) -> Iterable[torch.Tensor]:
    """Nothing: the network computes its position embedding, from which a stored one must not differ."""
    side = isqrt(tensor.shape[1])
    stored = tensor.reshape(1, side**2, -1, 4).flatten(2)[0].float()
    if not tensor.is_meta:
        computed = torch.as_tensor(get_2d_sincos_pos_embed(stored.shape[1], side, base_size=side, output_type="pt"))
        if not (stored - computed.float()).abs().max() <= POSITIONS_TOLERANCE:
            raise ValueError(f"is not the sines and cosines of {side} by {side} places that the network computes")
    return ()


_NOT: dict[Change, str] = {
    thirds: "does not split into q, k and v",
    fused: "does not split into q, k, v and the MLP",
    swapped: "does not split into shift and scale",
    matrix: "is not a convolution of one pixel",
    positions: "is not [1, side * side, width]",
}
"""The error where a tensor's shape does not allow a change."""


def rule(key: str, *names: str, change: Change | None = None) -> Rule:
    """A rule that renames or splits a tensor; without names it drops it."""
    return key, names, change


def each(words: Mapping[str, str], key: str, name: str) -> tuple[Rule, ...]:
    """A rule for each pair of words: the authors' stands in the place of `{}` in the key, diffusers' in the name."""
    return tuple(rule(key.format(theirs), name.format(ours)) for theirs, ours in words.items())


def apply(rules: Sequence[Rule], state: Tensors) -> State:
    """The state by the names that the rules give: views, but for what is swapped. On the meta device too.

    Raises ValueError naming the key: one that no rule reads, a shape that cannot be split, two tensors of one name.
    """
    highest = cache(lambda head: _highest(head, state))
    found: State = {}
    for key, tensor in state.items():
        match, (pattern, names, change) = _rule(rules, key, highest)
        pieces = _pieces(key, tensor, change, state) if change else [tensor]
        for name, piece in zip(names, pieces, strict=bool(names)):
            for full in _named(pattern, name, match, highest):
                if full in found:
                    raise ValueError(f"{key}: {full} stands in the file twice")
                found[full] = piece
    return found


def _pieces(key: str, tensor: torch.Tensor, change: Change, state: Tensors) -> Iterable[torch.Tensor]:
    try:
        return change(tensor, state)
    except (RuntimeError, LookupError) as error:
        raise ValueError(f"{key} has shape {list(tensor.shape)}, which {_NOT[change]}") from error
    except ValueError as error:
        raise ValueError(f"{key} {error}") from error


@cache
def _pattern(key: str) -> re.Pattern[str]:
    """The names that a rule of this key reads; groups are indices, words and endings."""
    pieces = re.split(r"(\*\*|[#$*]|\(.*?\))", key)
    return re.compile("".join(_TOKENS.get(one) or (one if one[:1] == "(" else re.escape(one)) for one in pieces))


def _rule(rules: Sequence[Rule], key: str, highest: Callable[[str], int]) -> tuple[re.Match[str], Rule]:
    """The first rule that reads this key."""
    for one in rules:
        match = _pattern(one[0]).fullmatch(key)
        head, marked, _ = one[0].partition("$")
        if match and (not marked or int(match[1]) == highest(head)):
            return match, one
    raise ValueError(f"unexpected weights: {key}")


def _named(key: str, name: str, match: re.Match[str], highest: Callable[[str], int]) -> Iterator[str]:
    """The names, which are more than one where `name` has a `%`."""
    read = iter(match.groups())
    if "~" in name:
        name = name.replace("~", str(highest(key.partition("#")[0]) - int(next(read))))
    named = re.sub(r"\*\*|[#*&]", lambda _: next(read), name)
    if "%" not in named:
        yield named
        return
    for index in range(highest("blocks.") + 1):
        yield named.replace("%", str(index))


def _highest(head: str, state: Tensors) -> int:
    """The highest index after `head` in the names of the state. Raises ValueError: indices are left out, which would
    also let a name ask for any number of copies."""
    pattern = re.compile(re.escape(head) + _INDEX + r"\.")
    indices = {int(match[1]) for key in state if (match := pattern.match(key))}
    if absent := set(range(len(indices))) - indices:
        raise ValueError(f"missing weights: {head}{min(absent)}, though it has {head}{max(indices)}")
    return len(indices) - 1


def _qkv(name: str) -> tuple[str, ...]:
    return tuple(name.format(part) for part in "qkv")


_EMBEDDER = "transformer_blocks.%.norm1.emb"
_MLP = {"mlp.0": "linear_1", "mlp.2": "linear_2"}
_FEED_FORWARD = {"mlp.fc1": "net.0.proj", "mlp.fc2": "net.2"}
DIT = (
    rule("x_embedder.proj.*", "pos_embed.proj.*"),
    rule("pos_embed", change=positions),
    *each(_MLP, "t_embedder.{}.*", f"{_EMBEDDER}.timestep_embedder.{{}}.*"),
    rule("y_embedder.embedding_table.weight", f"{_EMBEDDER}.class_embedder.embedding_table.weight"),
    rule("blocks.#.adaLN_modulation.1.*", "transformer_blocks.#.norm1.linear.*"),
    rule("blocks.#.attn.qkv.*", *_qkv("transformer_blocks.#.attn1.to_{}.*"), change=thirds),
    rule("blocks.#.attn.proj.*", "transformer_blocks.#.attn1.to_out.0.*"),
    *each(_FEED_FORWARD, "blocks.#.{}.*", "transformer_blocks.#.ff.{}.*"),
    rule("final_layer.adaLN_modulation.1.*", "proj_out_1.*"),
    rule("final_layer.linear.*", "proj_out_2.*"),
)

_IMAGE, _TEXT, _JOINT = "joint_blocks.#.x_block", "joint_blocks.#.context_block", "transformer_blocks.#"
_FINAL = (
    rule("final_layer.adaLN_modulation.1.*", "norm_out.linear.*", change=swapped),
    rule("final_layer.linear.*", "proj_out.*"),
)
SD3 = (
    rule("x_embedder.proj.*", "pos_embed.proj.*"),
    rule("pos_embed", "pos_embed.pos_embed"),
    rule("context_embedder.*", "context_embedder.*"),
    *each(_MLP, "t_embedder.{}.*", "time_text_embed.timestep_embedder.{}.*"),
    *each(_MLP, "y_embedder.{}.*", "time_text_embed.text_embedder.{}.*"),
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
    *each(_FEED_FORWARD, f"{_IMAGE}.{{}}.*", f"{_JOINT}.ff.{{}}.*"),
    *each(_FEED_FORWARD, f"{_TEXT}.{{}}.*", f"{_JOINT}.ff_context.{{}}.*"),
    *_FINAL,
)

_DOUBLE, _SINGLE = "double_blocks.#", "single_transformer_blocks.#"
_LAYERS = {"in_layer": "linear_1", "out_layer": "linear_2"}
_SCALES = {"query_norm.scale": "q.weight", "key_norm.scale": "k.weight"}
_SEQUENCE = {"0": "net.0.proj", "2": "net.2"}
FLUX = (
    rule("img_in.*", "x_embedder.*"),
    rule("txt_in.*", "context_embedder.*"),
    *each(_LAYERS, "time_in.{}.*", "time_text_embed.timestep_embedder.{}.*"),
    *each(_LAYERS, "vector_in.{}.*", "time_text_embed.text_embedder.{}.*"),
    *each(_LAYERS, "guidance_in.{}.*", "time_text_embed.guidance_embedder.{}.*"),
    rule(f"{_DOUBLE}.img_mod.lin.*", f"{_JOINT}.norm1.linear.*"),
    rule(f"{_DOUBLE}.img_attn.qkv.*", *_qkv(f"{_JOINT}.attn.to_{{}}.*"), change=thirds),
    *each(_SCALES, f"{_DOUBLE}.img_attn.norm.{{}}", f"{_JOINT}.attn.norm_{{}}"),
    rule(f"{_DOUBLE}.img_attn.proj.*", f"{_JOINT}.attn.to_out.0.*"),
    *each(_SEQUENCE, f"{_DOUBLE}.img_mlp.{{}}.*", f"{_JOINT}.ff.{{}}.*"),
    rule(f"{_DOUBLE}.txt_mod.lin.*", f"{_JOINT}.norm1_context.linear.*"),
    rule(f"{_DOUBLE}.txt_attn.qkv.*", *_qkv(f"{_JOINT}.attn.add_{{}}_proj.*"), change=thirds),
    *each(_SCALES, f"{_DOUBLE}.txt_attn.norm.{{}}", f"{_JOINT}.attn.norm_added_{{}}"),
    rule(f"{_DOUBLE}.txt_attn.proj.*", f"{_JOINT}.attn.to_add_out.*"),
    *each(_SEQUENCE, f"{_DOUBLE}.txt_mlp.{{}}.*", f"{_JOINT}.ff_context.{{}}.*"),
    rule("single_blocks.#.modulation.lin.*", f"{_SINGLE}.norm.linear.*"),
    rule("single_blocks.#.linear1.*", *_qkv(f"{_SINGLE}.attn.to_{{}}.*"), f"{_SINGLE}.proj_mlp.*", change=fused),
    *each(_SCALES, "single_blocks.#.norm.{}", f"{_SINGLE}.attn.norm_{{}}"),
    rule("single_blocks.#.linear2.*", f"{_SINGLE}.proj_out.*"),
    *_FINAL,
)

_RESNET, _HALF, _ATTENTION = "(norm1|conv1|norm2|conv2).*", "(encoder|decoder)", "&.mid_block.attentions.0"
_BLOCKS = {"block_1": "resnets.0", "block_2": "resnets.1"}
VAE = (
    rule(f"{_HALF}.(conv_in|conv_out).*", "&.&.*"),
    rule(f"{_HALF}.norm_out.*", "&.conv_norm_out.*"),
    *each(_BLOCKS, f"{_HALF}.mid.{{}}.{_RESNET}", "&.mid_block.{}.&.*"),
    *each(_BLOCKS, f"{_HALF}.mid.{{}}.nin_shortcut.*", "&.mid_block.{}.conv_shortcut.*"),
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

# The text encoders have transformers' names already. SD3's authors (sd3_infer.py) use the pooled state of CLIP-L before
# any projection. diffusers always projects, so it gets the identity.
TEXT = (rule("**", "**"),)
CLIP_L = (rule("text_projection.weight"), rule("logit_scale"), *TEXT)


@dataclass(frozen=True, slots=True)
class Layout:
    """One part as its authors' files name it.

    parts: names of the part in a model_index.json. classes: classes that it may have. prefixes: what files put before
    the names. signs: names that all files with this layout have, and no others. family: the family of a transformer.
    prefix: the one of `prefixes` that the file at hand uses.
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
    found = [one for layout in LAYOUTS if (one := layout.within(keys)) is not None]
    flux = any(one.family == "flux" for one in found)
    return {one.parts[-1 if flux and one.name == "T5" else 0]: one for one in reversed(found)}


def find_part(part: str, class_name: str, keys: Collection[str]) -> Layout:
    """The layout of this part in a file with these names. Raises ValueError naming the parts that it has."""
    for layout in LAYOUTS:
        if part in layout.parts and class_name in layout.classes and (found := layout.within(keys)) is not None:
            return found
    others = sorted(f"{name} ({one.name})" for name, one in parts_in(keys).items())
    contents = f"it holds {', '.join(others)}" if others else "no part of a known layout is in it"
    raise ValueError(f"no {part} of class {class_name}: {contents}")


def from_original(class_name: str, state: Tensors, part: str = "transformer") -> State:
    """The tensors of one part by diffusers' names, from all tensors of a file in its authors' layout.

    part: its name in a model_index.json. The tensors are views, but for those that diffusers has in another order; they
    may be on the meta device. Raises ValueError naming the key, or the parts that the file has.
    """
    return find_part(part, class_name, state.keys()).read(class_name, state)
