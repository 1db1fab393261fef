"""The original DiT, plainly: its forward and its sampling, re-derived from the papers in the words of their formulas.

Peebles and Xie 2022 (arXiv 2212.09748); sampling of Nichol and Dhariwal 2021 (arXiv 2102.09672), betas respaced as in
section 4 there. Run beside the code of facebookresearch/DiT (commit ed81ce2) in float64, the network is equal to the
bit, and 10 to 250 guided steps to 2e-7, because there the coefficients are rounded to float32.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import conv2d, gelu, layer_norm, linear, scaled_dot_product_attention, silu

State = dict[str, Tensor]
Noise = Callable[[int], Tensor]

FREQUENCIES = 256
EPS = 1e-6


def forward(state: State, heads: int, x: Tensor, t: Tensor, y: Tensor, half: float = FREQUENCIES // 2) -> Tensor:
    """The network of a state in the authors' names. x [N, C, H, H], t [N], y [N] -> [N, 2C, H, H].

    half: what the exponents of the timestep's frequencies are divided by: 128 of 128 (in float32, as the authors).
    """
    frequencies = torch.exp(-math.log(10000) * torch.arange(FREQUENCIES // 2, dtype=torch.float32) / half)
    angles = t[:, None].float() * frequencies
    c = linear(torch.cat([angles.cos(), angles.sin()], 1).to(x.dtype), *_pair(state, "t_embedder.mlp.0"))
    c = linear(silu(c), *_pair(state, "t_embedder.mlp.2")) + state["y_embedder.embedding_table.weight"][y]
    kernel, bias = _pair(state, "x_embedder.proj")
    side, width = x.shape[-1] // kernel.shape[-1], len(kernel)
    tokens = conv2d(x, kernel, bias, stride=kernel.shape[-1]).flatten(2).transpose(1, 2) + state["pos_embed"]
    for block in range(1 + max(int(key.split(".")[1]) for key in state if key.startswith("blocks."))):
        tokens = _block(state, f"blocks.{block}", heads, tokens, c)
    shift, scale = linear(silu(c), *_pair(state, "final_layer.adaLN_modulation.1"))[:, None].chunk(2, -1)
    out = linear(_norm(tokens, width) * (1 + scale) + shift, *_pair(state, "final_layer.linear"))
    out = out.reshape(len(x), side, side, kernel.shape[-1], kernel.shape[-1], -1)
    return out.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, x.shape[-1], x.shape[-1])


def _block(state: State, name: str, heads: int, tokens: Tensor, c: Tensor) -> Tensor:
    """adaLN-zero: attention and a perceptron, each shifted and scaled before and gated after."""
    width = tokens.shape[-1]
    modulation = linear(silu(c), *_pair(state, f"{name}.adaLN_modulation.1"))[:, None]
    shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = modulation.chunk(6, -1)
    fused = linear(_norm(tokens, width) * (1 + scale) + shift, *_pair(state, f"{name}.attn.qkv"))
    q, k, v = fused.unflatten(-1, (3, heads, width // heads)).permute(2, 0, 3, 1, 4)
    mixed = scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
    tokens = tokens + gate * linear(mixed, *_pair(state, f"{name}.attn.proj"))
    hidden = linear(_norm(tokens, width) * (1 + scale_mlp) + shift_mlp, *_pair(state, f"{name}.mlp.fc1"))
    return tokens + gate_mlp * linear(gelu(hidden, approximate="tanh"), *_pair(state, f"{name}.mlp.fc2"))


def _norm(tokens: Tensor, width: int) -> Tensor:
    return layer_norm(tokens, (width,), eps=EPS)


def _pair(state: State, name: str) -> tuple[Tensor, Tensor]:
    return state[f"{name}.weight"], state[f"{name}.bias"]


def positions(width: int, side: int) -> Tensor:
    """The sines and cosines of a square's columns, then of its rows: [1, side * side, width]."""
    rates = 1 / 10000 ** (np.arange(width // 4) / (width / 4))
    rows, columns = (place.reshape(-1, 1) * rates for place in np.mgrid[:side, :side])
    waves = [wave(angle) for angle in (columns, rows) for wave in (np.sin, np.cos)]
    return torch.from_numpy(np.concatenate(waves, 1)).float()[None]


def original_state(theirs: State, side: int) -> State:
    """The tensors of diffusers' layout under the authors' names: q, k and v in one, one embedder for all blocks.

    theirs: of DiTTransformer2DModel. side: tokens of a row.
    """
    width = len(theirs["pos_embed.proj.weight"])
    moved = {"pos_embed": positions(width, side)}
    names = {"pos_embed.proj": "x_embedder.proj", "proj_out_1": "final_layer.adaLN_modulation.1"}
    names |= {"proj_out_2": "final_layer.linear"}
    first = "transformer_blocks.0.norm1.emb"
    names |= {f"{first}.timestep_embedder.linear_{1 + number // 2}": f"t_embedder.mlp.{number}" for number in (0, 2)}
    names |= {f"{first}.class_embedder.embedding_table": "y_embedder.embedding_table"}
    for block in range(sum(key.endswith("norm1.linear.bias") for key in theirs)):
        own, their = f"blocks.{block}", f"transformer_blocks.{block}"
        names |= {f"{their}.norm1.linear": f"{own}.adaLN_modulation.1", f"{their}.attn1.to_out.0": f"{own}.attn.proj"}
        names |= {f"{their}.ff.net.0.proj": f"{own}.mlp.fc1", f"{their}.ff.net.2": f"{own}.mlp.fc2"}
        for kind in ("weight", "bias"):
            fused = [theirs[f"{their}.attn1.to_{letter}.{kind}"] for letter in "qkv"]
            moved[f"{own}.attn.qkv.{kind}"] = torch.cat(fused)
    for key, value in theirs.items():
        name, _, kind = key.rpartition(".")
        if name in names:
            moved[f"{names[name]}.{kind}"] = value
    return moved


def respaced(steps: int) -> list[int]:
    """The timesteps kept of 1000, ascending: `space_timesteps` of diffusion/respace.py, for one section.

    A position starts at 0 and grows by 999 / (steps - 1), added in float64 step by step; each is rounded, half to even.
    """
    stride, position, kept = 999 / (steps - 1), 0.0, set()
    for _ in range(steps):
        kept.add(round(position))
        position += stride
    return sorted(kept)


def sample(
    state: State, heads: int, label: int, first: Tensor, noise: Noise, *, steps: int, scale: float | None, null: int
) -> Tensor:
    """One latent [1, C, H, H] from `first`, float64. noise: by the number of a step from 0. scale: None is unguided.

    Betas of the kept timesteps, the posterior's mean, and the variance between its bounds by the learned fraction
    (Nichol and Dhariwal 2021, eq. 15), in logarithms; guidance acts on the first three channels alone.
    """
    bars = np.cumprod(1 - np.linspace(1e-4, 2e-2, 1000))
    kept = respaced(steps)
    bar = bars[kept]
    before = np.append(1.0, bar[:-1])
    betas = 1 - bar / before
    variance = betas * (1 - before) / (1 - bar)
    low = np.log(np.append(variance[1], variance[1:]))
    x, channels = first.double(), first.shape[1]
    labels = torch.tensor([label] if scale is None else [label, null])
    for number, i in enumerate(reversed(range(steps))):
        t = torch.tensor([kept[i]] * len(labels))
        out = forward(state, heads, x.repeat(len(labels), 1, 1, 1), t, labels)
        eps, v = out[:1, :channels].clone(), out[:1, channels:]
        if scale is not None:
            eps[:, :3] = out[1:, :3] + scale * (out[:1, :3] - out[1:, :3])
        clean = x / math.sqrt(bar[i]) - math.sqrt(1 / bar[i] - 1) * eps
        mean = betas[i] * math.sqrt(before[i]) / (1 - bar[i]) * clean
        mean = mean + (1 - before[i]) * math.sqrt(1 - betas[i]) / (1 - bar[i]) * x
        spread = (v + 1) / 2 * math.log(betas[i]) + (1 - v) / 2 * low[i]
        x = mean + (torch.exp(0.5 * spread) * noise(number).double() if i else 0)
    return x


def doubled(state: State) -> State:
    return {key: value.double() for key, value in state.items()}
