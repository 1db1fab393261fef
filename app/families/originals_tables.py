"""Tables: the authors' own layouts, each as rules from their names to diffusers' names.

Knows nothing of files or of how a rule is read (originals_rules.py has its signs).

The names on the left are those of the modules in facebookresearch/DiT models.py, Stability-AI/sd3.5 mmditx.py,
black-forest-labs/flux model.py, and CompVis/latent-diffusion's autoencoder (Stability's sd3_impls.py and BFL's
autoencoder.py have the same).
"""

from __future__ import annotations

from itertools import chain
from math import isqrt

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from app.families.originals_rules import Rule, Tensors, check, drop, matrix, rename, split, swapped

POSITIONS_TOLERANCE = 1e-2
"""Of the values of a stored position embedding, which are sines: bfloat16 keeps them to 4e-3."""


def _positions(key: str, tensor: torch.Tensor, state: Tensors) -> None:
    side = isqrt(tensor.shape[1]) if tensor.ndim == 3 else 0
    if tensor.ndim != 3 or tensor.shape[0] != 1 or side**2 != tensor.shape[1] or not side or tensor.shape[2] % 4:
        raise ValueError(f"{key} has shape {list(tensor.shape)}, not [1, side * side, width]")
    if tensor.is_meta:
        return
    computed = torch.as_tensor(get_2d_sincos_pos_embed(tensor.shape[2], side, base_size=side, output_type="pt"))
    difference = (tensor[0].float() - computed.float()).abs().max()
    if not difference <= POSITIONS_TOLERANCE:
        raise ValueError(f"{key} is not the sines and cosines of {side} by {side} places that the network computes")


def _linear1(key: str, tensor: torch.Tensor, state: Tensors) -> list[torch.Tensor]:
    """FLUX's fused q, k, v and MLP: three times the width, then what is left; views."""
    width = state["img_in.weight"].shape[0] if "img_in.weight" in state else 0
    rest = tensor.shape[0] - 3 * width if tensor.ndim in (1, 2) else 0
    if width < 1 or rest < 1:
        raise ValueError(f"{key} has shape {list(tensor.shape)}, which does not split into q, k, v and the MLP")
    return list(torch.split(tensor, [width, width, width, rest]))


_EMBEDDER = "transformer_blocks.%.norm1.emb"
DIT = (
    rename("x_embedder.proj.*", "pos_embed.proj.*"),
    check("pos_embed", _positions),
    rename("t_embedder.mlp.0.*", f"{_EMBEDDER}.timestep_embedder.linear_1.*", every="blocks."),
    rename("t_embedder.mlp.2.*", f"{_EMBEDDER}.timestep_embedder.linear_2.*", every="blocks."),
    rename("y_embedder.embedding_table.weight", f"{_EMBEDDER}.class_embedder.embedding_table.weight", every="blocks."),
    rename("blocks.#.adaLN_modulation.1.*", "transformer_blocks.#.norm1.linear.*"),
    split("blocks.#.attn.qkv.*", *(f"transformer_blocks.#.attn1.to_{part}.*" for part in "qkv")),
    rename("blocks.#.attn.proj.*", "transformer_blocks.#.attn1.to_out.0.*"),
    rename("blocks.#.mlp.fc1.*", "transformer_blocks.#.ff.net.0.proj.*"),
    rename("blocks.#.mlp.fc2.*", "transformer_blocks.#.ff.net.2.*"),
    rename("final_layer.adaLN_modulation.1.*", "proj_out_1.*"),
    rename("final_layer.linear.*", "proj_out_2.*"),
)


def _embedder(theirs: str, ours: str, layers: tuple[str, str]) -> tuple[Rule, ...]:
    return tuple(
        rename(f"{theirs}.{layer}.*", f"time_text_embed.{ours}_embedder.linear_{number}.*")
        for number, layer in enumerate(layers, 1)
    )


def _stream(theirs: str, ours: tuple[str, str, str], attn: str = "attn") -> tuple[Rule, ...]:
    """The attention of one stream of an SD3 block. ours: to_q..., the norms' and the output's names."""
    to, norm, out = ours
    block, other = f"joint_blocks.#.{theirs}.{attn}", f"transformer_blocks.#.{attn}"
    return (
        split(f"{block}.qkv.*", *(f"{other}.{to.format(part)}.*" for part in "qkv")),
        rename(f"{block}.ln_q.weight", f"{other}.{norm.format('q')}.weight"),
        rename(f"{block}.ln_k.weight", f"{other}.{norm.format('k')}.weight"),
        rename(f"{block}.proj.*", f"{other}.{out}.*"),
    )


_IMAGE, _TEXT = ("to_{}", "norm_{}", "to_out.0"), ("add_{}_proj", "norm_added_{}", "to_add_out")
SD3 = (
    rename("x_embedder.proj.*", "pos_embed.proj.*"),
    rename("pos_embed", "pos_embed.pos_embed"),
    rename("context_embedder.*", "context_embedder.*"),
    *_embedder("t_embedder.mlp", "timestep", ("0", "2")),
    *_embedder("y_embedder.mlp", "text", ("0", "2")),
    *_stream("x_block", _IMAGE),
    *_stream("x_block", _IMAGE, "attn2"),
    *_stream("context_block", _TEXT),
    rename("joint_blocks.#.x_block.adaLN_modulation.1.*", "transformer_blocks.#.norm1.linear.*"),
    # The last block ends the text: its modulation is a final one, of which diffusers swaps the halves.
    rename("joint_blocks.$.context_block.adaLN_modulation.1.*", "transformer_blocks.#.norm1_context.linear.*", swapped),
    rename("joint_blocks.#.context_block.adaLN_modulation.1.*", "transformer_blocks.#.norm1_context.linear.*"),
    rename("joint_blocks.#.x_block.mlp.fc1.*", "transformer_blocks.#.ff.net.0.proj.*"),
    rename("joint_blocks.#.x_block.mlp.fc2.*", "transformer_blocks.#.ff.net.2.*"),
    rename("joint_blocks.#.context_block.mlp.fc1.*", "transformer_blocks.#.ff_context.net.0.proj.*"),
    rename("joint_blocks.#.context_block.mlp.fc2.*", "transformer_blocks.#.ff_context.net.2.*"),
    rename("final_layer.adaLN_modulation.1.*", "norm_out.linear.*", swapped),
    rename("final_layer.linear.*", "proj_out.*"),
)


def _double(theirs: str, context: str, ours: tuple[str, str, str]) -> tuple[Rule, ...]:
    """One stream of a FLUX double block."""
    to, norm, out = ours
    block, other = f"double_blocks.#.{theirs}", "transformer_blocks.#"
    return (
        rename(f"{block}_mod.lin.*", f"{other}.norm1{context}.linear.*"),
        split(f"{block}_attn.qkv.*", *(f"{other}.attn.{to.format(part)}.*" for part in "qkv")),
        rename(f"{block}_attn.norm.query_norm.scale", f"{other}.attn.{norm.format('q')}.weight"),
        rename(f"{block}_attn.norm.key_norm.scale", f"{other}.attn.{norm.format('k')}.weight"),
        rename(f"{block}_attn.proj.*", f"{other}.attn.{out}.*"),
        rename(f"{block}_mlp.0.*", f"{other}.ff{context}.net.0.proj.*"),
        rename(f"{block}_mlp.2.*", f"{other}.ff{context}.net.2.*"),
    )


_SINGLE, _IN_OUT = "single_transformer_blocks.#", ("in_layer", "out_layer")
FLUX = (
    rename("img_in.*", "x_embedder.*"),
    rename("txt_in.*", "context_embedder.*"),
    *_embedder("time_in", "timestep", _IN_OUT),
    *_embedder("vector_in", "text", _IN_OUT),
    *_embedder("guidance_in", "guidance", _IN_OUT),
    *_double("img", "", _IMAGE),
    *_double("txt", "_context", _TEXT),
    rename("single_blocks.#.modulation.lin.*", f"{_SINGLE}.norm.linear.*"),
    split(
        "single_blocks.#.linear1.*",
        *(f"{_SINGLE}.attn.to_{part}.*" for part in "qkv"),
        f"{_SINGLE}.proj_mlp.*",
        change=_linear1,
    ),
    rename("single_blocks.#.norm.query_norm.scale", f"{_SINGLE}.attn.norm_q.weight"),
    rename("single_blocks.#.norm.key_norm.scale", f"{_SINGLE}.attn.norm_k.weight"),
    rename("single_blocks.#.linear2.*", f"{_SINGLE}.proj_out.*"),
    rename("final_layer.adaLN_modulation.1.*", "norm_out.linear.*", swapped),
    rename("final_layer.linear.*", "proj_out.*"),
)


def _resnet(theirs: str, ours: str) -> tuple[Rule, ...]:
    layers = ("norm1", "conv1", "norm2", "conv2")
    plain = (rename(f"{theirs}.{layer}.*", f"{ours}.{layer}.*") for layer in layers)
    return (*plain, rename(f"{theirs}.nin_shortcut.*", f"{ours}.conv_shortcut.*"))


def _half(half: str) -> tuple[Rule, ...]:
    """What the encoder and the decoder both have."""
    theirs, ours = f"{half}.mid.attn_1", f"{half}.mid_block.attentions.0"
    attention = {"q": "to_q", "k": "to_k", "v": "to_v", "proj_out": "to_out.0"}
    return (
        rename(f"{half}.conv_in.*", f"{half}.conv_in.*"),
        rename(f"{half}.conv_out.*", f"{half}.conv_out.*"),
        rename(f"{half}.norm_out.*", f"{half}.conv_norm_out.*"),
        *_resnet(f"{half}.mid.block_1", f"{half}.mid_block.resnets.0"),
        *_resnet(f"{half}.mid.block_2", f"{half}.mid_block.resnets.1"),
        rename(f"{theirs}.norm.*", f"{ours}.group_norm.*"),
        *(rename(f"{theirs}.{layer}.*", f"{ours}.{name}.*", matrix) for layer, name in attention.items()),
    )


VAE = (
    *chain.from_iterable(map(_half, ("encoder", "decoder"))),
    *_resnet("encoder.down.#.block.#", "encoder.down_blocks.#.resnets.#"),
    rename("encoder.down.#.downsample.conv.*", "encoder.down_blocks.#.downsamplers.0.conv.*"),
    *_resnet("decoder.up.#.block.#", "decoder.up_blocks.~.resnets.#"),
    rename("decoder.up.#.upsample.conv.*", "decoder.up_blocks.~.upsamplers.0.conv.*"),
    rename("quant_conv.*", "quant_conv.*"),
    rename("post_quant_conv.*", "post_quant_conv.*"),
    drop("loss.**"),
    drop("model_ema.**"),
)

# The text encoders have transformers' names already. Of SD3's CLIP-L the authors' code (sd3_infer.py) takes the pooled
# state before any projection; diffusers, which always projects, is given the identity.
TEXT = (rename("**", "**"),)
CLIP_L = (drop("text_projection.weight"), drop("logit_scale"), *TEXT)


def identity_projection(found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A CLIP that has no projection gets the identity: a `text_projection.weight` of its width."""
    norm = found.get("text_model.final_layer_norm.weight")
    if "text_projection.weight" in found or norm is None or norm.ndim != 1:
        return found
    return {**found, "text_projection.weight": torch.eye(norm.shape[0], dtype=norm.dtype, device=norm.device)}
