"""The networks of SD3 and FLUX and the ldm autoencoder, plainly, on states by their authors' names.

Re-derived in the words of their formulas (Esser et al. 2024,
arXiv:2403.03206; Black Forest Labs' published code for FLUX, which has no paper). Beside the authors' modules, run from
their repositories on the same states, all three are equal to 5e-7.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, group_norm, interpolate, layer_norm, linear, pad, silu
from torch.nn.functional import scaled_dot_product_attention as attend

State = dict[str, Tensor]


def sd3(state: State, heads: int, x: Tensor, t: Tensor, pooled: Tensor, text: Tensor) -> Tensor:
    """x [N, 4, h, w], t [N] of 1000, pooled [N, 40], text [N, L, 48] -> [N, 4, h, w]."""
    rows, columns = x.shape[2] // 2, x.shape[3] // 2
    side = math.isqrt(state["pos_embed"].shape[1])
    top, left = (side - rows) // 2, (side - columns) // 2
    places = state["pos_embed"].unflatten(1, (side, side))[:, top : top + rows, left : left + columns].flatten(1, 2)
    tokens = conv2d(x, *_pair(state, "x_embedder.proj"), stride=2).flatten(2).transpose(1, 2) + places
    c = silu(_mlp(state, "t_embedder.mlp", waves(t)) + _mlp(state, "y_embedder.mlp", pooled))
    text = linear(text, *_pair(state, "context_embedder"))
    depth = 1 + max(int(key.split(".")[1]) for key in state if key.startswith("joint_blocks."))
    for block in range(depth):
        text, tokens = _joint(state, f"joint_blocks.{block}", heads, text, tokens, c)
    out = _final(state, tokens, c).unflatten(1, (rows, columns)).unflatten(-1, (2, 2, 4))
    return out.permute(0, 5, 1, 3, 2, 4).flatten(4).flatten(2, 3)


def _joint(state: State, name: str, heads: int, text: Tensor, tokens: Tensor, c: Tensor) -> tuple[Tensor, Tensor]:
    """One attention over both streams; the image's own second one where there is one; the last block ends the text."""
    mods = {one: linear(c, *_pair(state, f"{name}.{one}.adaLN_modulation.1"))[:, None] for one in _BLOCKS}
    pieces = {one: mod.chunk(mod.shape[-1] // tokens.shape[-1], -1) for one, mod in mods.items()}
    streams = {"context_block": text, "x_block": tokens}
    shifted = {one: _shifted(stream, *pieces[one][:2]) for one, stream in streams.items()}
    own = {one: _qkv(state, f"{name}.{one}.attn", heads, stream) for one, stream in shifted.items()}
    mixed = attend(*(torch.cat(pair, 2) for pair in zip(own["context_block"], own["x_block"], strict=True)))
    mixed = mixed.transpose(1, 2).flatten(2)
    results = dict(zip(streams, mixed.split((text.shape[1], tokens.shape[1]), 1), strict=True))
    for one, stream in streams.items():
        if len(pieces[one]) == 2:
            continue
        _, _, gate, shift, scale, gate_mlp, *second = pieces[one]
        after = stream + gate * linear(results[one], *_pair(state, f"{name}.{one}.attn.proj"))
        if second:
            qkv = _qkv(state, f"{name}.{one}.attn2", heads, _shifted(stream, *second[:2]))
            again = attend(*qkv).transpose(1, 2).flatten(2)
            after = after + second[2] * linear(again, *_pair(state, f"{name}.{one}.attn2.proj"))
        hidden = gelu(linear(_shifted(after, shift, scale), *_pair(state, f"{name}.{one}.mlp.fc1")), approximate="tanh")
        streams[one] = after + gate_mlp * linear(hidden, *_pair(state, f"{name}.{one}.mlp.fc2"))
    return streams["context_block"], streams["x_block"]


_BLOCKS = ("context_block", "x_block")


def _qkv(state: State, name: str, heads: int, tokens: Tensor) -> list[Tensor]:
    fused = linear(tokens, *_pair(state, f"{name}.qkv")).unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    norms = [state.get(f"{name}.ln_{letter}.weight") for letter in "qk"]
    return [_rms(part, norm) for part, norm in zip(fused, [*norms, None], strict=True)]


def flux(state: State, heads: int, image: Tensor, places: Tensor, text: Tensor, pooled: Tensor, t: Tensor,
         guidance: Tensor | None, axes: tuple[int, ...]) -> Tensor:  # fmt: skip
    """image [N, T, 16], places [T, 3], text [N, L, 48], pooled [N, 16], t [N] of 1, guidance [N] -> [N, T, 16]."""
    ends = ("in_layer", "out_layer")
    c = _mlp(state, "time_in", waves(1000 * t), ends) + _mlp(state, "vector_in", pooled, ends)
    if guidance is not None:
        c = c + _mlp(state, "guidance_in", waves(1000 * guidance), ends)
    c = silu(c)
    ids = torch.cat((torch.zeros(text.shape[1], 3), places))
    angles = torch.cat([ids[:, [i]] / 10000 ** (torch.arange(0, n, 2) / n) for i, n in enumerate(axes)], 1)
    streams = {"txt": linear(text, *_pair(state, "txt_in")), "img": linear(image, *_pair(state, "img_in"))}
    blocks = sorted({tuple(key.split(".")[:2]) for key in state if "_blocks." in key}, key=lambda b: (b[0], int(b[1])))
    for kind, number in (block for block in blocks if block[0] == "double_blocks"):
        streams = _double(state, f"{kind}.{number}", heads, streams, c, angles)
    tokens = torch.cat(list(streams.values()), 1)
    for kind, number in (block for block in blocks if block[0] == "single_blocks"):
        tokens = _single(state, f"{kind}.{number}", heads, tokens, c, angles)
    return _final(state, tokens[:, text.shape[1] :], c)


def _double(state: State, name: str, heads: int, streams: State, c: Tensor, angles: Tensor) -> State:
    mods = {one: linear(c, *_pair(state, f"{name}.{one}_mod.lin"))[:, None].chunk(6, -1) for one in streams}
    parts = []
    for one, stream in streams.items():
        fused = linear(_shifted(stream, *mods[one][:2]), *_pair(state, f"{name}.{one}_attn.qkv"))
        parts.append(_turned(state, f"{name}.{one}_attn.norm", heads, fused))
    mixed = _attended([torch.cat(pair, 2) for pair in zip(*parts, strict=True)], angles)
    after = {}
    lengths = [stream.shape[1] for stream in streams.values()]
    for (one, stream), result in zip(streams.items(), mixed.split(lengths, 1), strict=True):
        _, _, gate, shift, scale, gate_mlp = mods[one]
        stream = stream + gate * linear(result, *_pair(state, f"{name}.{one}_attn.proj"))
        hidden = gelu(linear(_shifted(stream, shift, scale), *_pair(state, f"{name}.{one}_mlp.0")), approximate="tanh")
        after[one] = stream + gate_mlp * linear(hidden, *_pair(state, f"{name}.{one}_mlp.2"))
    return after


def _single(state: State, name: str, heads: int, tokens: Tensor, c: Tensor, angles: Tensor) -> Tensor:
    width = tokens.shape[-1]
    shift, scale, gate = linear(c, *_pair(state, f"{name}.modulation.lin"))[:, None].chunk(3, -1)
    fused, hidden = linear(_shifted(tokens, shift, scale), *_pair(state, f"{name}.linear1")).split(
        (3 * width, 4 * width), -1
    )
    mixed = _attended(_turned(state, f"{name}.norm", heads, fused), angles)
    joined = torch.cat((mixed, gelu(hidden, approximate="tanh")), -1)
    return tokens + gate * linear(joined, *_pair(state, f"{name}.linear2"))


def _turned(state: State, name: str, heads: int, fused: Tensor) -> list[Tensor]:
    q, k, v = fused.unflatten(-1, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    return [_rms(q, state[f"{name}.query_norm.scale"]), _rms(k, state[f"{name}.key_norm.scale"]), v]


def _attended(parts: list[Tensor], angles: Tensor) -> Tensor:
    """Pairs of numbers of q and k as points of a plane, turned by the angles of their places."""
    turns = torch.polar(torch.ones_like(angles), angles)
    q, k = (
        torch.view_as_real(torch.view_as_complex(part.unflatten(-1, (-1, 2))) * turns).flatten(3) for part in parts[:2]
    )
    return attend(q, k, parts[2]).transpose(1, 2).flatten(2)


def decoded(state: State, z: Tensor, groups: int) -> Tensor:
    """Latents [N, C, h, w] to pixels [N, 3, H, W]."""
    if "post_quant_conv.weight" in state:
        z = conv2d(z, *_pair(state, "post_quant_conv"))
    h = conv2d(z, *_pair(state, "decoder.conv_in"), padding=1)
    h = _residual(state, "decoder.mid.block_1", h, groups)
    n = group_norm(h, groups, *_pair(state, "decoder.mid.attn_1.norm"), eps=1e-6)
    q, k, v = (conv2d(n, *_pair(state, f"decoder.mid.attn_1.{one}")).flatten(2).transpose(1, 2) for one in "qkv")
    mixed = attend(q[:, None], k[:, None], v[:, None])[:, 0].transpose(1, 2).unflatten(2, h.shape[2:])
    h = _residual(state, "decoder.mid.block_2", h + conv2d(mixed, *_pair(state, "decoder.mid.attn_1.proj_out")), groups)
    for level in range(max(int(key.split(".")[2]) for key in state if key.startswith("decoder.up.")), -1, -1):
        for block in range(2):
            h = _residual(state, f"decoder.up.{level}.block.{block}", h, groups)
        if level:
            h = conv2d(interpolate(h, scale_factor=2.0), *_pair(state, f"decoder.up.{level}.upsample.conv"), padding=1)
    h = silu(group_norm(h, groups, *_pair(state, "decoder.norm_out"), eps=1e-6))
    return conv2d(h, *_pair(state, "decoder.conv_out"), padding=1)


def encoded(state: State, x: Tensor, groups: int) -> Tensor:
    """Pixels [N, 3, H, W] to mean and log variance [N, 2C, h, w]."""
    h = conv2d(x, *_pair(state, "encoder.conv_in"), padding=1)
    levels = 1 + max(int(key.split(".")[2]) for key in state if key.startswith("encoder.down."))
    for level in range(levels):
        h = _residual(state, f"encoder.down.{level}.block.0", h, groups)
        if level < levels - 1:
            h = conv2d(pad(h, (0, 1, 0, 1)), *_pair(state, f"encoder.down.{level}.downsample.conv"), stride=2)
    h = _residual(state, "encoder.mid.block_1", h, groups)
    n = group_norm(h, groups, *_pair(state, "encoder.mid.attn_1.norm"), eps=1e-6)
    q, k, v = (conv2d(n, *_pair(state, f"encoder.mid.attn_1.{one}")).flatten(2).transpose(1, 2) for one in "qkv")
    mixed = attend(q[:, None], k[:, None], v[:, None])[:, 0].transpose(1, 2).unflatten(2, h.shape[2:])
    h = _residual(state, "encoder.mid.block_2", h + conv2d(mixed, *_pair(state, "encoder.mid.attn_1.proj_out")), groups)
    h = silu(group_norm(h, groups, *_pair(state, "encoder.norm_out"), eps=1e-6))
    h = conv2d(h, *_pair(state, "encoder.conv_out"), padding=1)
    return conv2d(h, *_pair(state, "quant_conv")) if "quant_conv.weight" in state else h


def _residual(state: State, name: str, x: Tensor, groups: int) -> Tensor:
    h = x
    for number in (1, 2):
        h = silu(group_norm(h, groups, *_pair(state, f"{name}.norm{number}"), eps=1e-6))
        h = conv2d(h, *_pair(state, f"{name}.conv{number}"), padding=1)
    return h + (conv2d(x, *_pair(state, f"{name}.nin_shortcut")) if f"{name}.nin_shortcut.weight" in state else x)


def waves(t: Tensor) -> Tensor:
    """The cosines and sines of a time [N] of 1000: [N, 256]."""
    angles = t[:, None] * torch.exp(-math.log(10000) * torch.arange(128, dtype=torch.float32) / 128)
    return torch.cat((angles.cos(), angles.sin()), 1)


def _mlp(state: State, name: str, x: Tensor, ends: tuple[str, str] = ("0", "2")) -> Tensor:
    weight, bias = _pair(state, f"{name}.{ends[0]}")  # float64 where the state is; waves are float32, as the authors'
    return linear(silu(linear(x.to(weight.dtype), weight, bias)), *_pair(state, f"{name}.{ends[1]}"))


def _final(state: State, tokens: Tensor, c: Tensor) -> Tensor:
    shift, scale = linear(c, *_pair(state, "final_layer.adaLN_modulation.1"))[:, None].chunk(2, -1)
    return linear(_shifted(tokens, shift, scale), *_pair(state, "final_layer.linear"))


def _shifted(tokens: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    return layer_norm(tokens, tokens.shape[-1:], eps=1e-6) * (1 + scale) + shift


def _rms(x: Tensor, weight: Tensor | None) -> Tensor:
    return x if weight is None else x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight


def _pair(state: State, name: str) -> tuple[Tensor, Tensor]:
    return state[f"{name}.weight"], state[f"{name}.bias"]
