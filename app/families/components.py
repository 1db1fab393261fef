"""Components: the allowlist of classes that a checkpoint may name, and how each is built from its folder and weights.

Knows nothing of cards, devices or families; it reads config.json and tokenizer files, never a weights file.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, SD3Transformer2DModel
from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings

from app.errors import CheckpointError
from app.families.text import clip_keys, t5_keys
from app.families.vae import vae_keys

State = dict[str, torch.Tensor]

JSON_LIMIT = 16 * 2**20
"""Bytes; the largest real tokenizer.json (T5's) has 2.4 MB and is not read through here."""

_BUFFER_LIMIT = 2**26
"""Elements of one computed buffer: a DiT-XL at 2048 px has 2^24."""


@dataclass(frozen=True)
class _Network:
    kind: Any
    config: type | None = None
    keys: Callable[[State, set[str]], State] = lambda state, expected: state


_DIT = _Network(DiTTransformer2DModel)
_NETWORKS = {
    "DiTTransformer2DModel": _DIT,
    "Transformer2DModel": _DIT,
    "SD3Transformer2DModel": _Network(SD3Transformer2DModel),
    "AutoencoderKL": _Network(AutoencoderKL, keys=vae_keys),
    "CLIPTextModelWithProjection": _Network(CLIPTextModelWithProjection, CLIPTextConfig, clip_keys),
    "T5EncoderModel": _Network(T5EncoderModel, T5Config, t5_keys),
}
_TOKENIZERS = {
    "CLIPTokenizer": CLIPTokenizer,
    "CLIPTokenizerFast": CLIPTokenizer,
    "T5Tokenizer": T5Tokenizer,
    "T5TokenizerFast": T5Tokenizer,
}
_TOKENIZER_FILES = {CLIPTokenizer: ("tokenizer.json", "vocab.json"), T5Tokenizer: ("tokenizer.json",)}

ALLOWED = frozenset(_NETWORKS) | frozenset(_TOKENIZERS)
"""Every class name that a model_index.json may give to a part."""


def has_weights(class_name: str) -> bool:
    """Whether the component is a network, whose `state` must be read, and not a tokenizer."""
    return class_name in _NETWORKS


def build_component(class_name: str, folder: Path, state: State | None, dtype: torch.dtype) -> Any:
    """A network (eval mode, no gradients, on the CPU, its own copy of the weights in `dtype`) or a tokenizer.

    state: the tensors of `folder` for a network, None for a tokenizer. Raises CheckpointError: class outside the
    allowlist, corrupt config, keys or shapes that are not exactly the network's.
    """
    if class_name not in ALLOWED:
        raise CheckpointError(f'{folder}: the class "{class_name}" is not one that this server loads')
    if class_name in _TOKENIZERS:
        return _tokenizer(_TOKENIZERS[class_name], folder)
    if state is None:
        raise CheckpointError(f"{folder}: a {class_name} needs weights")
    spec = _NETWORKS[class_name]
    network = _without_weights(spec, folder, len(state))
    try:
        named = spec.keys(state, set(network.state_dict()))
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    _fill(network, folder, named, dtype)
    _compute_buffers(network, folder)
    if isinstance(network, T5EncoderModel):
        network.set_input_embeddings(network.shared)  # type: ignore[no-untyped-call]
    return network.eval().requires_grad_(False)


def read_json(file: Path) -> dict[str, Any]:
    """A JSON object of at most 16 MB. Raises CheckpointError naming the file."""
    try:
        if file.stat().st_size > JSON_LIMIT:
            raise CheckpointError(f"{file}: over {JSON_LIMIT} bytes")
        content = json.loads(file.read_bytes())
    except FileNotFoundError as error:
        raise CheckpointError(f"{file}: missing") from error
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{file}: not readable as JSON: {error}") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{file}: not a JSON object")
    return content


def _without_weights(spec: _Network, folder: Path, tensors: int) -> nn.Module:
    """The module on the meta device: neither memory nor random numbers are spent, and shapes are known."""
    config = read_json(folder / "config.json")
    # NOTE: only the network's own fields pass. A config may also name an attention kernel to download, a dtype
    # (which transformers would make the default of the whole process while it builds), or other code.
    fields = spec.config.__annotations__ if spec.config else inspect.signature(spec.kind.__init__).parameters
    known = {key: value for key, value in config.items() if key in fields and key != "self"}
    for key, value in known.items():
        depth = len(value) if isinstance(value, list) else value if "layers" in key and isinstance(value, int) else 0
        if depth > tensors:
            raise CheckpointError(f"{folder / 'config.json'}: {key} = {depth}, but the weights hold {tensors} tensors")
    try:
        with torch.device("meta"):
            network: nn.Module = spec.kind(spec.config(**known)) if spec.config else spec.kind(**known)
            return network
    except Exception as error:
        raise CheckpointError(f"{folder / 'config.json'}: {spec.kind.__name__} refuses it: {error}") from error


def _fill(network: nn.Module, folder: Path, state: State, dtype: torch.dtype) -> None:
    expected = network.state_dict()
    _refuse(folder, "missing", expected.keys() - state.keys())
    _refuse(folder, "unexpected", state.keys() - expected.keys())
    for key, value in state.items():
        if value.shape != expected[key].shape:
            is_, wanted = list(value.shape), list(expected[key].shape)
            raise CheckpointError(f"{folder}: {key} has shape {is_}, the network's is {wanted}")
        if not value.is_floating_point():
            raise CheckpointError(f"{folder}: {key} holds {value.dtype}, not floating point")
    # A copy even where the dtype agrees: what was read may be a map of the file, which can change under the model.
    own = {id(value): value.to(dtype, copy=True) for value in state.values()}
    network.load_state_dict({key: own[id(value)] for key, value in state.items()}, strict=True, assign=True)


def _refuse(folder: Path, what: str, keys: Iterable[str]) -> None:
    first = sorted(keys)
    if first:
        more = f" and {len(first) - 1} more" if len(first) > 1 else ""
        raise CheckpointError(f"{folder}: {what} weights: {first[0]}{more}")


def _compute_buffers(network: nn.Module, folder: Path) -> None:
    """Give the buffers that no checkpoint holds their values: on the meta device they have none."""
    for name, module in network.named_modules():
        for key in module._non_persistent_buffers_set:
            meta = module.get_buffer(key)
            if meta.numel() > _BUFFER_LIMIT:
                raise CheckpointError(f"{folder / 'config.json'}: {name}.{key} would have {meta.numel()} elements")
            module.register_buffer(key, _buffer(module, key), persistent=False)


def _buffer(module: nn.Module, key: str) -> torch.Tensor:
    if isinstance(module, CLIPTextEmbeddings) and key == "position_ids":
        return torch.arange(module.position_embedding.num_embeddings).expand((1, -1))
    if isinstance(module, PatchEmbed) and key == "pos_embed":
        grid = get_2d_sincos_pos_embed(
            module.proj.out_channels,
            module.height,
            base_size=module.base_size,
            interpolation_scale=module.interpolation_scale,
            output_type="pt",
        )
        return torch.as_tensor(grid).float().unsqueeze(0)
    raise CheckpointError(f"{type(module).__name__}.{key}: a buffer that this server cannot compute")


def _tokenizer(kind: Any, folder: Path) -> Any:
    if not any((folder / name).is_file() for name in _TOKENIZER_FILES[kind]):
        raise CheckpointError(f"{folder / 'tokenizer.json'}: missing")
    try:
        tokenizer = kind.from_pretrained(str(folder), local_files_only=True)
    except (KeyboardInterrupt, SystemExit):
        raise
    except BaseException as error:
        # NOTE: a bad regex in tokenizer.json raises the Rust library's PanicException, which is no Exception.
        raise CheckpointError(f"{folder}: the tokenizer's files are not readable: {error}") from error
    if tokenizer.pad_token is None:
        raise CheckpointError(f"{folder}: the tokenizer has no padding token")
    return tokenizer
