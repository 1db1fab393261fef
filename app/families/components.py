"""Components: the allowlist of classes that a checkpoint may name, how each is built, and how tensors differ from it.

It reads config.json and tokenizer files, never a file of weights.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, DiTTransformer2DModel, FluxTransformer2DModel, SD3Transformer2DModel
from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed
from torch import nn
from transformers import (
    CLIPTextConfig,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizer,
    T5Config,
    T5EncoderModel,
    T5Tokenizer,
)
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings

from app.cards.files import read_json
from app.cards.folder import Part
from app.errors import CheckpointError
from app.families.dit import dit_keys, share_embedders
from app.families.text import State, clip_keys, t5_keys
from app.families.vae import vae_keys

DEPTH = 1000
"""Blocks of the deepest network that tensors are compared with."""

_BUFFER_LIMIT = 2**26
"""Elements of one computed buffer: a DiT-XL at 2048 px has 2^24."""


@dataclass(frozen=True)
class _Network:
    kind: Any
    config: type | None = None
    keys: Callable[[State, Mapping[str, object]], State] = lambda state, expected: state
    shape: Callable[[Any, Mapping[str, Any]], None] = lambda network, config: None


_DIT = _Network(DiTTransformer2DModel, keys=dit_keys, shape=share_embedders)
_NETWORKS = {
    "DiTTransformer2DModel": _DIT,
    "Transformer2DModel": _DIT,
    "SD3Transformer2DModel": _Network(SD3Transformer2DModel),
    "FluxTransformer2DModel": _Network(FluxTransformer2DModel),
    "AutoencoderKL": _Network(AutoencoderKL, keys=vae_keys),
    "CLIPTextModel": _Network(CLIPTextModel, CLIPTextConfig, clip_keys),
    "CLIPTextModelWithProjection": _Network(CLIPTextModelWithProjection, CLIPTextConfig, clip_keys),
    "T5EncoderModel": _Network(T5EncoderModel, T5Config, t5_keys),
}
_TOKENIZERS = {
    "CLIPTokenizer": CLIPTokenizer,
    "CLIPTokenizerFast": CLIPTokenizer,
    "T5Tokenizer": T5Tokenizer,
    "T5TokenizerFast": T5Tokenizer,
}

ALLOWED = frozenset(_NETWORKS) | frozenset(_TOKENIZERS)
"""Every class name that a model_index.json may give to a part."""


def has_weights(class_name: str) -> bool:
    """Whether the component is a network and not a tokenizer."""
    return class_name in _NETWORKS


def build_tokenizer(class_name: str, folder: Path) -> Any:
    """A tokenizer from its folder. Raises CheckpointError: its files are missing or not readable."""
    kind: Any = _TOKENIZERS[class_name]
    Part("", class_name, folder).check()
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


def blank_network(class_name: str, folder: Path, outline: State, file: Path | None = None) -> nn.Module:
    """The network of a config.json in eval mode, its weights on the meta device: no memory is spent.

    outline: the tensors of its files, of which names, shapes and number formats are compared (they may be on the meta
    device). file: where they are, when not in the folder. Raises CheckpointError: a class outside the allowlist, a
    corrupt config, keys or shapes that are not exactly the network's.
    """
    network = _without_weights(class_name, folder, len(outline))
    _named(network, class_name, file or folder, outline, whole=True)
    _compute_buffers(network, folder)
    if isinstance(network, T5EncoderModel):
        network.set_input_embeddings(network.shared)  # type: ignore[no-untyped-call]
    return network.eval().requires_grad_(False)


def fill_network(
    network: nn.Module, class_name: str, where: Path, states: Iterable[State], device: torch.device, dtype: torch.dtype
) -> None:
    """Give a blank or emptied network its own copy of the weights of these shards, one after another.

    where: the folder or file that errors name. Raises CheckpointError: names, shapes, or two tensors for one weight.
    """
    for state in states:
        _fill(network, where, _named(network, class_name, where, state), device, dtype)
        del state  # and its map, before the next is made
    _refuse(where, "missing", (key for key, value in network.state_dict().items() if value.is_meta))
    for _, module, key in _computed(network):
        module.register_buffer(key, module.get_buffer(key).to(device), persistent=False)


def _fill(network: nn.Module, where: Path, named: State, device: torch.device, dtype: torch.dtype) -> None:
    # A copy even where the dtype agrees: what was read may be a map of the file, which can change under the model.
    own = {
        id(value): value.to(device, dtype, copy=True, memory_format=_layout(value, device))
        for value in {id(value): value for value in named.values()}.values()
    }
    filled = {key: value for key, value in network.state_dict().items() if key in named and not value.is_meta}
    for key, value in filled.items():  # a weight of two names, one of which stood in an earlier shard
        if not torch.equal(own[id(named[key])], value):
            raise CheckpointError(f"{where}: {key} is a second name of weights, and differs from the first")
    fresh = {key: own[id(value)] for key, value in named.items() if key not in filled}
    network.load_state_dict(fresh, strict=False, assign=True)


def _layout(weight: torch.Tensor, device: torch.device) -> torch.memory_format:
    """Channels last for convolutions on a CPU, where a VAE's decode then takes a sixth less."""
    return torch.channels_last if weight.ndim == 4 and device.type == "cpu" else torch.preserve_format


def empty_network(network: nn.Module) -> None:
    """Put the weights back on the meta device, so that their memory is free; the network stays the same object."""
    for module in network.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(parameter, device="meta"), requires_grad=False)
        for name, buffer in module._buffers.items():
            if buffer is not None and name not in module._non_persistent_buffers_set:
                module._buffers[name] = torch.empty_like(buffer, device="meta")


@cache
def outline_of(class_name: str, folder: Path) -> State:
    """Names and shapes of the network of a shipped config.json, on the meta device; do not change it.

    The config is trusted to be as deep as it says. Raises CheckpointError.
    """
    return _without_weights(class_name, folder, DEPTH).state_dict(keep_vars=True)


def counts(class_name: str, folder: Path) -> tuple[int, int]:
    """Parameters of that network, as they are published; and all numbers that it keeps in memory.

    The second has buffers too (SD3's positions). Tensors with several names count once.
    """
    own = {id(value): value for value in outline_of(class_name, folder).values()}.values()
    return sum(one.numel() for one in own if isinstance(one, nn.Parameter)), sum(one.numel() for one in own)


def differences(class_name: str, folder: Path, outline: State) -> list[str]:
    """The differences of these tensors from that network's weights, a line each; none: they are its weights.

    Only names, shapes and number formats are compared. Raises CheckpointError as `outline_of`.
    """
    expected = outline_of(class_name, folder)
    try:
        named = _NETWORKS[class_name].keys(outline, expected)
    except ValueError as error:
        return [str(error)]
    odd = [key for key in sorted(expected.keys() & named.keys()) if named[key].shape != expected[key].shape]
    return [
        *(f"{key} is missing" for key in sorted(expected.keys() - named.keys())),
        *(f"{key} is no tensor of the network" for key in sorted(named.keys() - expected.keys())),
        *(f"{key} has shape {list(named[key].shape)}, not {list(expected[key].shape)}" for key in odd),
        *(f"{key} holds {named[key].dtype}" for key in sorted(named) if not named[key].is_floating_point()),
    ]


def _without_weights(class_name: str, folder: Path, tensors: int) -> nn.Module:
    """The module on the meta device: neither memory nor random numbers are spent, and shapes are known."""
    if class_name not in _NETWORKS:
        raise CheckpointError(f'{folder}: the class "{class_name}" is not one that this server loads')
    spec = _NETWORKS[class_name]
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
            spec.shape(network, config)
            return network
    except Exception as error:
        raise CheckpointError(f"{folder / 'config.json'}: {spec.kind.__name__} refuses it: {error}") from error


def _named(network: nn.Module, class_name: str, folder: Path, state: State, whole: bool = False) -> State:
    """The state by the network's own names, in exactly its shapes: all of them if it is to be the whole."""
    expected = network.state_dict(keep_vars=True)  # so that two names of one tensor are seen to be
    try:
        named = _NETWORKS[class_name].keys(state, expected)
    except ValueError as error:
        raise CheckpointError(f"{folder}: {error}") from error
    _refuse(folder, "missing", expected.keys() - named.keys() if whole else ())
    _refuse(folder, "unexpected", named.keys() - expected.keys())
    for key, value in named.items():
        if value.shape != expected[key].shape:
            is_, wanted = list(value.shape), list(expected[key].shape)
            raise CheckpointError(f"{folder}: {key} has shape {is_}, the network's is {wanted}")
        if not value.is_floating_point():
            raise CheckpointError(f"{folder}: {key} holds {value.dtype}, not floating point")
    return named


def _refuse(folder: Path, what: str, keys: Iterable[str]) -> None:
    first = sorted(keys)
    if first:
        more = f" and {len(first) - 1} more" if len(first) > 1 else ""
        raise CheckpointError(f"{folder}: {what} weights: {first[0]:.200}{more}")


def _compute_buffers(network: nn.Module, folder: Path) -> None:
    """Give the buffers that no checkpoint holds their values: on the meta device they have none."""
    for name, module, key in _computed(network):
        count = module.get_buffer(key).numel()
        if count > _BUFFER_LIMIT:
            raise CheckpointError(f"{folder / 'config.json'}: {name}.{key} would have {count} elements")
        module.register_buffer(key, _buffer(module, key), persistent=False)


def _computed(network: nn.Module) -> list[tuple[str, nn.Module, str]]:
    return [(n, module, key) for n, module in network.named_modules() for key in module._non_persistent_buffers_set]


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
