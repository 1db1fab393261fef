"""Names and shapes as the authors of DiT, SD3, FLUX and the ldm autoencoder give them, and drawn tensors of them."""

from __future__ import annotations

import math
from itertools import pairwise

import torch
from torch import Tensor

from tests.seeds import plain_dit

State = dict[str, Tensor]
Shapes = dict[str, tuple[int, ...]]


def drawn(shapes: Shapes, seed: int = 0) -> State:
    """Random tensors of these shapes, of which the outputs of networks are O(1)."""
    random = torch.Generator().manual_seed(seed)
    return {
        key: torch.randn(shape, generator=random) * (math.prod(shape[1:]) ** -0.5 if len(shape) > 1 else 0.3)
        for key, shape in shapes.items()
    }


def _linears(layers: dict[str, tuple[int, ...]]) -> Shapes:
    """Weights, and biases of as many numbers as the weights have rows."""
    return {f"{name}.weight": shape for name, shape in layers.items()} | {
        f"{name}.bias": shape[:1] for name, shape in layers.items()
    }


def dit_state(width: int = 32, depth: int = 2, patch: int = 2, side: int = 4) -> State:
    """A DiT of 10 classes and heads of 16, by its authors' names."""
    layers: Shapes = {"x_embedder.proj.weight": (width, 4, patch, patch), "x_embedder.proj.bias": (width,)}
    sizes = {"t_embedder.mlp.0": (width, 256), "t_embedder.mlp.2": (width, width)}
    sizes |= {"final_layer.linear": (8 * patch**2, width), "final_layer.adaLN_modulation.1": (2 * width, width)}
    for own in (f"blocks.{block}" for block in range(depth)):
        sizes |= {f"{own}.attn.qkv": (3 * width, width), f"{own}.attn.proj": (width, width)}
        sizes |= {f"{own}.mlp.fc1": (4 * width, width), f"{own}.mlp.fc2": (width, 4 * width)}
        sizes |= {f"{own}.adaLN_modulation.1": (6 * width, width)}
    layers |= {f"{name}.weight": shape for name, shape in sizes.items()}
    layers |= {f"{name}.bias": shape[:1] for name, shape in sizes.items()}
    layers["y_embedder.embedding_table.weight"] = (11, width)
    return {**drawn(layers), "pos_embed": plain_dit.positions(width, side)}


def sd3_shapes(width: int, depth: int, *, dual: int = 0, norm: bool = False, side: int = 12) -> Shapes:
    """4 latent channels, text of 48, pooled text of 40, heads of 16; the first `dual` blocks have two attentions."""
    layers = {"x_embedder.proj": (width, 4, 2, 2), "context_embedder": (width, 48), "final_layer.linear": (16, width)}
    layers |= {"t_embedder.mlp.0": (width, 256), "y_embedder.mlp.0": (width, 40)}
    layers |= {f"{name}_embedder.mlp.2": (width, width) for name in "ty"}
    layers["final_layer.adaLN_modulation.1"] = (2 * width, width)
    norms: Shapes = {}
    for block in range(depth):
        for name, last in (("x_block", False), ("context_block", block == depth - 1)):
            own = f"joint_blocks.{block}.{name}"
            twice = name == "x_block" and block < dual
            layers[f"{own}.adaLN_modulation.1"] = ((2 if last else 9 if twice else 6) * width, width)
            for attn in ("attn", "attn2")[: 1 + twice]:
                layers[f"{own}.{attn}.qkv"] = (3 * width, width)
                layers |= {} if last else {f"{own}.{attn}.proj": (width, width)}
                norms |= {f"{own}.{attn}.ln_{letter}.weight": (16,) for letter in "qk" if norm}
            layers |= {} if last else {f"{own}.mlp.fc1": (4 * width, width), f"{own}.mlp.fc2": (width, 4 * width)}
    return {"pos_embed": (1, side * side, width), **_linears(layers), **norms}


def flux_shapes(width: int, double: int, single: int, *, guided: bool) -> Shapes:
    """16 packed channels, text of 48, pooled text of 16, heads of 16, an MLP four times as wide."""
    layers = {"img_in": (width, 16), "txt_in": (width, 48), "final_layer.linear": (16, width)}
    for name, size in (("time_in", 256), ("vector_in", 16), *((("guidance_in", 256),) if guided else ())):
        layers |= {f"{name}.in_layer": (width, size), f"{name}.out_layer": (width, width)}
    layers["final_layer.adaLN_modulation.1"] = (2 * width, width)
    norms: Shapes = {}
    for own in (f"double_blocks.{block}.{stream}" for block in range(double) for stream in ("img", "txt")):
        layers |= {f"{own}_mod.lin": (6 * width, width), f"{own}_attn.qkv": (3 * width, width)}
        layers |= {f"{own}_attn.proj": (width, width)}
        layers |= {f"{own}_mlp.0": (4 * width, width), f"{own}_mlp.2": (width, 4 * width)}
        norms |= {f"{own}_attn.norm.{name}_norm.scale": (16,) for name in ("query", "key")}
    for own in (f"single_blocks.{block}" for block in range(single)):
        layers |= {f"{own}.modulation.lin": (3 * width, width), f"{own}.linear1": (7 * width, width)}
        layers |= {f"{own}.linear2": (width, 5 * width)}
        norms |= {f"{own}.norm.{name}_norm.scale": (16,) for name in ("query", "key")}
    return {**_linears(layers), **norms}


def vae_shapes(widths: tuple[int, ...], latent: int, *, quant: bool) -> Shapes:
    """One resnet at each of the encoder's levels and two at each of the decoder's."""
    first, last = widths[0], widths[-1]
    layers = {"encoder.conv_in": (first, 3, 3, 3), "encoder.conv_out": (2 * latent, last, 3, 3)}
    layers |= {"decoder.conv_in": (last, latent, 3, 3), "decoder.conv_out": (3, first, 3, 3)}
    layers |= {"encoder.norm_out": (last,), "decoder.norm_out": (first,)}
    for half in ("encoder", "decoder"):
        own = f"{half}.mid.attn_1"
        layers |= {
            f"{own}.norm": (last,),
            **{f"{own}.{name}": (last, last, 1, 1) for name in ("q", "k", "v", "proj_out")},
        }
        layers |= _resnet(f"{half}.mid.block_1", last, last) | _resnet(f"{half}.mid.block_2", last, last)
    for level, (before, width) in enumerate(pairwise((first, *widths))):
        layers |= _resnet(f"encoder.down.{level}.block.0", before, width)
        layers |= {f"encoder.down.{level}.downsample.conv": (width, width, 3, 3)} if level < len(widths) - 1 else {}
        above = widths[min(level + 1, len(widths) - 1)]
        layers |= _resnet(f"decoder.up.{level}.block.0", above, width) | _resnet(
            f"decoder.up.{level}.block.1", width, width
        )
        layers |= {f"decoder.up.{level}.upsample.conv": (width, width, 3, 3)} if level else {}
    if quant:
        layers |= {"quant_conv": (2 * latent, 2 * latent, 1, 1), "post_quant_conv": (latent, latent, 1, 1)}
    return _linears(layers)


def _resnet(name: str, before: int, width: int) -> Shapes:
    shortcut = {f"{name}.nin_shortcut": (width, before, 1, 1)} if before != width else {}
    convolutions = {f"{name}.conv1": (width, before, 3, 3), f"{name}.conv2": (width, width, 3, 3)}
    return {f"{name}.norm1": (before,), f"{name}.norm2": (width,), **convolutions, **shortcut}


CLIP: Shapes = {"text_model.embeddings.token_embedding.weight": (5, 8), "text_model.final_layer_norm.weight": (8,)}
T5: Shapes = {"shared.weight": (5, 8), "encoder.block.0.layer.0.SelfAttention.q.weight": (8, 8)}
"""What tells these from others; not whole ones."""


def prefixed(prefix: str, state: State) -> State:
    return {prefix + key: value for key, value in state.items()}


def random(*shape: int, seed: int = 7) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def same(ours: State, others: State) -> None:
    assert ours.keys() == others.keys()
    assert all(torch.equal(ours[key], others[key]) for key in ours)
