"""Start an MMDiT from a trained DiT: a DiT is its image stream, whose class the captions tell.

What the DiT knows of every subject's looks took hours to learn; how to read a caption does not. Knows nothing of
losses.
"""

from __future__ import annotations

import numpy as np
import torch
from bound import Levels
from data import Subject, caption, draw_scene
from diffusers import DiTTransformer2DModel, SD3Transformer2DModel
from text import Text
from torch import Tensor, nn
from tqdm import tqdm

from app.families.dit import predict

KEPT = (0, 1, 4, 5)
"""The DiT's blocks that stay: without 2 and 3 its loss rises least of all pairs."""


def start_from(model: SD3Transformer2DModel, dit: DiTTransformer2DModel, text: Text, subjects: list[Subject]) -> None:
    """Copy the DiT's image stream, and fit the embedders of time and captions to its own of times and classes."""
    if len(KEPT) != len(model.transformer_blocks):
        raise ValueError(f"{len(model.transformer_blocks)} blocks, not {len(KEPT)}")
    with torch.no_grad():
        copy_stream(model, dit)
        match_norms(model, dit)
    fit(model.time_text_embed.timestep_embedder, *times_of(model, dit))
    fit(model.time_text_embed.text_embedder, *captions_of(dit, text, subjects))


def copy_stream(model: SD3Transformer2DModel, dit: DiTTransformer2DModel) -> None:
    """Patches, blocks, and the way out, of which the noise and not its variance is a start for the velocity."""
    model.pos_embed.proj.load_state_dict(dit.pos_embed.proj.state_dict())
    for block, index in zip(model.transformer_blocks, KEPT, strict=True):
        own = dit.transformer_blocks[index]
        block.norm1.linear.load_state_dict(own.norm1.linear.state_dict())
        block.ff.load_state_dict(own.ff.state_dict())
        for name in ("to_q", "to_k", "to_v", "to_out"):
            getattr(block.attn, name).load_state_dict(getattr(own.attn1, name).state_dict())
    for name in ("weight", "bias"):
        shift, scale = getattr(dit.proj_out_1, name).chunk(2)
        getattr(model.norm_out.linear, name).copy_(torch.cat([scale, shift]))  # the two classes differ in the order
        last = getattr(dit.proj_out_2, name).unflatten(0, (-1, dit.config.out_channels))[:, : model.out_channels]
        getattr(model.proj_out, name).copy_(last.flatten(0, 1))


def match_norms(model: SD3Transformer2DModel, dit: DiTTransformer2DModel) -> None:
    """QK-norm makes every query and key as long as the DiT's are on average."""
    lengths: dict[nn.Module, Tensor] = {}
    hooks = [
        linear.register_forward_hook(lambda module, _, out: lengths.update({module: out.pow(2).mean().sqrt()}))
        for block in dit.transformer_blocks
        for linear in (block.attn1.to_q, block.attn1.to_k)
    ]
    x, t = torch.randn(256, dit.config.in_channels, 8, 8), torch.randint(1000, (256,))
    predict(dit, x, t, torch.randint(dit.config.num_embeds_ada_norm, (256,)))
    for hook in hooks:
        hook.remove()
    for block, index in zip(model.transformer_blocks, KEPT, strict=True):
        own = dit.transformer_blocks[index].attn1
        block.attn.norm_q.weight.fill_(lengths[own.to_q])
        block.attn.norm_k.weight.fill_(lengths[own.to_k])


@torch.no_grad()
def times_of(model: SD3Transformer2DModel, dit: DiTTransformer2DModel) -> tuple[Tensor, Tensor]:
    """What a flow's time is embedded from, and the DiT's embedding of the step that is as noisy."""
    snr = Levels("cpu")("snr", torch.arange(1000)).flatten()
    flow = torch.linspace(0.001, 0.999, 4096)
    step = torch.searchsorted(-snr, -((1 - flow) / flow).pow(2)).clamp(max=999)
    embed = dit.transformer_blocks[0].norm1.emb
    return model.time_text_embed.time_proj(flow * 1000), embed.timestep_embedder(embed.time_proj(step))


@torch.no_grad()
def captions_of(
    dit: DiTTransformer2DModel, text: Text, subjects: list[Subject], each: int = 24
) -> tuple[Tensor, Tensor]:
    """Pooled captions, with an encoder absent now and then, and the DiT's embeddings of their subjects."""
    table = dit.transformer_blocks[0].norm1.emb.class_embedder.embedding_table.weight
    rng, pooled, classes = np.random.default_rng(0), [], []
    for _ in tqdm(range(each * len(subjects) // 256), desc="captions", mininterval=10):
        scenes = [draw_scene(rng, subjects) for _ in range(256)]
        captions = [caption(rng, scene, subjects[scene.subject]) for scene in scenes]
        captions[:16] = [""] * 16
        pooled.append(text(captions, (torch.rand(256, 3) > 0.1).float())[1])
        classes.append(torch.tensor([len(subjects)] * 16 + [scene.subject for scene in scenes[16:]]))
    return torch.cat(pooled), table[torch.cat(classes)]


def fit(module: nn.Module, given: Tensor, wanted: Tensor, steps: int = 3000, batch: int = 256) -> None:
    """Least squares, by Adam on random batches."""
    optimizer = torch.optim.Adam(module.parameters(), 2e-3)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 2e-3 * (1 - step / steps)
        where = torch.randint(len(given), (batch,))
        loss = (module(given[where]) - wanted[where]).pow(2).mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        optimizer.step()
    tqdm.write(f"fitted to {loss.item():.4f} of {wanted.var().item():.4f}")
