"""Files in the layouts of Stable Diffusion's, SD3's and FLUX's authors, made of diffusers' tensors: the way back.

It is written plainly. The app's tables go the other way. Tensors may be on the meta device.
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]
ENCODERS = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
_NAMES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def read(folder: Path) -> State:
    """The tensors of a part's folder."""
    (file,) = folder.glob("*.safetensors")
    return load_file(file)


def write(state: State, file: Path) -> Path:
    file.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, file)
    return file


def write_sparse(state: State, file: Path, number: str = "BF16") -> Path:
    """A file of the true size of meta tensors, which has its header and holes."""
    header, end = {}, 0
    for name, tensor in state.items():
        begin, end = end, end + math.prod(tensor.shape) * _NAMES[number].itemsize
        header[name] = {"dtype": number, "shape": list(tensor.shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text)
    with file.open("r+b") as stream:
        stream.truncate(8 + len(text) + end)
    return file


def sd3_file(folder: Path, *encoders: str) -> State:
    """What stands in one file: network and VAE of a diffusers folder, and these of its text encoders."""
    state = {f"model.diffusion_model.{name}": value for name, value in sd3(read(folder / "transformer")).items()}
    state |= {f"first_stage_model.{name}": value for name, value in vae(read(folder / "vae")).items()}
    for part in encoders:
        state |= {f"text_encoders.{ENCODERS[part]}.transformer.{k}": v for k, v in read(folder / part).items()}
    return state


def sd3(own: State) -> State:
    """mmditx.py's names of an SD3Transformer2DModel."""
    last = max(int(name.split(".")[1]) for name in own if name.startswith("transformer_blocks."))
    found: State = {"pos_embed": own["pos_embed.pos_embed"]}
    for kind in ("weight", "bias"):
        plain = {"x_embedder.proj": "pos_embed.proj", "context_embedder": "context_embedder"}
        for theirs, ours in (("t_embedder", "timestep_embedder"), ("y_embedder", "text_embedder")):
            plain |= {f"{theirs}.mlp.{2 * n}": f"time_text_embed.{ours}.linear_{n + 1}" for n in (0, 1)}
        plain["final_layer.linear"] = "proj_out"
        found |= {f"{theirs}.{kind}": own[f"{ours}.{kind}"] for theirs, ours in plain.items()}
        found[f"final_layer.adaLN_modulation.1.{kind}"] = swap(own[f"norm_out.linear.{kind}"])
        for index in range(last + 1):
            found |= _block(own, index, kind, index == last)
    for name, value in own.items():
        if ".norm_" in name and name.startswith("transformer_blocks."):
            index, attn, norm = name.split(".")[1:4]
            block = "context_block" if "added" in norm else "x_block"
            found[f"joint_blocks.{index}.{block}.{attn}.ln_{norm[-1]}.weight"] = value
    return found


def _block(own: State, index: int, kind: str, last: bool) -> State:
    ours, theirs = f"transformer_blocks.{index}", f"joint_blocks.{index}"
    found: State = {}
    for block, ff, norm in (("x_block", "ff", "norm1"), ("context_block", "ff_context", "norm1_context")):
        modulation = own[f"{ours}.{norm}.linear.{kind}"]
        found[f"{theirs}.{block}.adaLN_modulation.1.{kind}"] = (
            swap(modulation) if last and block == "context_block" else modulation
        )
        if f"{ours}.{ff}.net.2.{kind}" in own:
            found[f"{theirs}.{block}.mlp.fc1.{kind}"] = own[f"{ours}.{ff}.net.0.proj.{kind}"]
            found[f"{theirs}.{block}.mlp.fc2.{kind}"] = own[f"{ours}.{ff}.net.2.{kind}"]
    for block, attn, to, out in (
        ("x_block", "attn", "to_{}", "to_out.0"),
        ("context_block", "attn", "add_{}_proj", "to_add_out"),
        ("x_block", "attn2", "to_{}", "to_out.0"),
    ):
        if f"{ours}.{attn}.{to.format('q')}.{kind}" in own:
            parts = [own[f"{ours}.{attn}.{to.format(letter)}.{kind}"] for letter in "qkv"]
            found[f"{theirs}.{block}.{attn}.qkv.{kind}"] = torch.cat(parts)
        if f"{ours}.{attn}.{out}.{kind}" in own:
            found[f"{theirs}.{block}.{attn}.proj.{kind}"] = own[f"{ours}.{attn}.{out}.{kind}"]
    return found


_FLUX = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
    "proj_out": "final_layer.linear",
    **{
        f"time_text_embed.{ours}_embedder.linear_{n}": f"{theirs}_in.{layer}"
        for ours, theirs in (("timestep", "time"), ("guidance", "guidance"), ("text", "vector"))
        for n, layer in ((1, "in_layer"), (2, "out_layer"))
    },
}
_DOUBLE = {
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
    "attn.norm_q": "img_attn.norm.query_norm",
    "attn.norm_k": "img_attn.norm.key_norm",
    "attn.norm_added_q": "txt_attn.norm.query_norm",
    "attn.norm_added_k": "txt_attn.norm.key_norm",
    "attn.to_out.0": "img_attn.proj",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
}
_SINGLE = {
    "norm.linear": "modulation.lin",
    "proj_out": "linear2",
    "attn.norm_q": "norm.query_norm",
    "attn.norm_k": "norm.key_norm",
}
_FUSED = {
    ("transformer_blocks", "attn.to_q"): (["attn.to_q", "attn.to_k", "attn.to_v"], "img_attn.qkv"),
    ("transformer_blocks", "attn.add_q_proj"): (
        ["attn.add_q_proj", "attn.add_k_proj", "attn.add_v_proj"],
        "txt_attn.qkv",
    ),
    ("single_transformer_blocks", "attn.to_q"): (["attn.to_q", "attn.to_k", "attn.to_v", "proj_mlp"], "linear1"),
}


def flux(own: State) -> State:
    """model.py's names of a FluxTransformer2DModel."""
    blocks = {"transformer_blocks": ("double_blocks", _DOUBLE), "single_transformer_blocks": ("single_blocks", _SINGLE)}
    found: State = {}
    for name, value in own.items():
        module, _, kind = name.rpartition(".")
        if module in _FLUX:
            found[f"{_FLUX[module]}.{kind}"] = swap(value) if module == "norm_out.linear" else value
            continue
        ours, index, rest = module.split(".", 2)
        theirs, names = blocks[ours]
        if rest in names:
            found[f"{theirs}.{index}.{names[rest]}.{'scale' if '.norm_' in rest else kind}"] = value
        elif (ours, rest) in _FUSED:
            parts, fused = _FUSED[ours, rest]
            found[f"{theirs}.{index}.{fused}.{kind}"] = torch.cat(
                [own[f"{ours}.{index}.{one}.{kind}"] for one in parts]
            )
    return found


_UNET = {
    **{f"time_embedding.linear_{n}": f"time_embed.{2 * n - 2}" for n in (1, 2)},
    **{f"add_embedding.linear_{n}": f"label_emb.0.{2 * n - 2}" for n in (1, 2)},
    **{"conv_in": "input_blocks.0.0", "conv_norm_out": "out.0", "conv_out": "out.2"},
}
_RESNET = {
    **{"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"},
    **{"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"},
}


def unet(own: State) -> State:
    """openaimodel.py's names of a UNet2DConditionModel with two layers in each block."""
    with_attention = {name.split(".")[1] for name in own if re.match(r"up_blocks\.\d+\.attentions", name)}
    found = {}
    for name, value in own.items():
        module, _, kind = name.rpartition(".")
        found[f"{_UNET.get(module) or _unet_block(module, with_attention)}.{kind}"] = value
    return found


def _unet_block(module: str, with_attention: set[str]) -> str:
    """with_attention: indices of the up_blocks that have some."""
    if module.startswith("mid_block."):
        _, kind, index, rest = module.split(".", 3)
        return f"middle_block.1.{rest}" if kind == "attentions" else f"middle_block.{2 * int(index)}.{_RESNET[rest]}"
    side, block, kind, index, rest = module.split(".", 4)
    if side == "down_blocks":
        theirs = f"input_blocks.{1 + 3 * int(block) + (2 if kind == 'downsamplers' else int(index))}"
    else:
        theirs = f"output_blocks.{3 * int(block) + (2 if kind == 'upsamplers' else int(index))}"
    places = {"resnets": f"0.{_RESNET.get(rest)}", "attentions": f"1.{rest}", "downsamplers": "0.op"}
    places["upsamplers"] = f"{1 + (block in with_attention)}.conv"
    return f"{theirs}.{places[kind]}"


_CLIP = {"embeddings.position_embedding.weight": "positional_embedding", "text_projection.weight": "text_projection"}
_CLIP |= {"embeddings.token_embedding.weight": "token_embedding.weight"}
_CLIP_BLOCK = {"self_attn.out_proj": "attn.out_proj", "layer_norm1": "ln_1", "layer_norm2": "ln_2"}
_CLIP_BLOCK |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}


def open_clip(own: State) -> State:
    """open_clip's names of a CLIP's text model."""
    bare = {name.removeprefix("text_model."): value for name, value in own.items()}
    found = {"logit_scale": torch.tensor(4.6)}
    for name, value in bare.items():
        module, _, kind = name.rpartition(".")
        if name in _CLIP:
            found[_CLIP[name]] = value.T if name == "text_projection.weight" else value
        elif module == "final_layer_norm":
            found[f"ln_final.{kind}"] = value
        else:
            _, _, index, rest = module.split(".", 3)
            block = f"transformer.resblocks.{index}"
            if rest == "self_attn.q_proj":
                letters = [bare[f"encoder.layers.{index}.self_attn.{letter}_proj.{kind}"] for letter in "qkv"]
                found[f"{block}.attn.in_proj_{kind}"] = torch.cat(letters)
            elif rest in _CLIP_BLOCK:
                found[f"{block}.{_CLIP_BLOCK[rest]}.{kind}"] = value
    return found


def last_of_open_clip(own: State) -> State:
    """What a file of Stable Diffusion 2 has of its CLIP and the model does not use: the 24th block, the projection."""
    first = {name: value for name, value in own.items() if name.startswith("transformer.resblocks.0.")}
    width = own["positional_embedding"].shape[1]
    return {name.replace("resblocks.0.", "resblocks.23."): value.clone() for name, value in first.items()} | {
        "text_projection": torch.eye(width)
    }


BUFFERS = ("betas", "alphas_cumprod", "sqrt_one_minus_alphas_cumprod", "model_ema.decay", "model_ema.num_updates")
"""Of training code, in published files of Stable Diffusion."""


def unet_file(folder: Path) -> State:
    """What stands in one file of Stable Diffusion: a diffusers folder, and buffers that nobody uses."""
    state = {f"model.diffusion_model.{name}": value for name, value in unet(read(folder / "unet")).items()}
    state |= {f"first_stage_model.{name}": value for name, value in vae(read(folder / "vae")).items()}
    first, second = folder / "text_encoder", folder / "text_encoder_2"
    if first.is_dir() and json.loads((first / "config.json").read_text())["hidden_act"] == "gelu":  # an OpenCLIP
        own = open_clip(read(first))
        own |= last_of_open_clip(own)
        state |= {f"cond_stage_model.model.{name}": value for name, value in own.items()}
    elif first.is_dir():
        prefix = "conditioner.embedders.0" if second.is_dir() else "cond_stage_model"
        state |= {f"{prefix}.transformer.{name}": value for name, value in read(first).items()}
        state[f"{prefix}.transformer.text_model.embeddings.position_ids"] = torch.arange(77)[None]
    if second.is_dir():
        prefix = f"conditioner.embedders.{int(first.is_dir())}.model"
        state |= {f"{prefix}.{name}": value for name, value in open_clip(read(second)).items()}
    return state | {name: torch.ones(3) for name in BUFFERS}


def vae(own: State) -> State:
    """latent-diffusion's names of an AutoencoderKL."""
    top = max(int(name.split(".")[2]) for name in own if name.startswith("decoder.up_blocks."))
    words = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "mid_block": "mid"}
    attention = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
    found = {}
    for name, value in own.items():
        new = name.replace("downsamplers.0", "downsample").replace("upsamplers.0", "upsample")
        for ours, theirs in words.items():
            new = new.replace(ours, theirs)
        if ".attentions.0." in new:
            for ours, theirs in attention.items():
                new = new.replace(f"attentions.0.{ours}.", f"attn_1.{theirs}.")
            value = value[:, :, None, None] if value.ndim == 2 else value
        if "mid.resnets." in new:
            new = new.replace("mid.resnets.0", "mid.block_1").replace("mid.resnets.1", "mid.block_2")
        for half, ours, theirs in (("encoder", "down_blocks", "down"), ("decoder", "up_blocks", "up")):
            if new.startswith(f"{half}.{ours}."):
                index, rest = new.removeprefix(f"{half}.{ours}.").split(".", 1)
                place = index if half == "encoder" else str(top - int(index))
                new = f"{half}.{theirs}.{place}.{rest.replace('resnets', 'block')}"
        found[new] = value
    return found


def swap(value: torch.Tensor) -> torch.Tensor:
    return torch.cat(value.chunk(2)[::-1])
