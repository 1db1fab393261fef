"""Components: the classes that a checkpoint may name, how each is built, and how a file's tensors differ from it.

It reads config.json and tokenizer files, never a file of weights.
"""

import inspect
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DiTTransformer2DModel,
    FluxTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
)
from diffusers.models.embeddings import PatchEmbed, get_2d_sincos_pos_embed
from torch import nn
from transformers import CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer, T5EncoderModel, T5Tokenizer
from transformers.models.clip.modeling_clip import CLIPTextEmbeddings

from app.cards.files import read_json
from app.cards.folder import Part
from app.errors import CheckpointError
from app.families.base import CLIP_TOKENIZER
from app.families.dit import share_embedders
from app.families.text import State, clip_keys
from app.families.vae import vae_keys

DEPTH = 1000
"""Blocks of the deepest network that tensors are compared with."""

_BUFFER_LIMIT = 2**26
"""Elements of one computed buffer: a DiT-XL at 2048 px has 2^24."""

_KINDS: tuple[Any, ...] = (
    *(DiTTransformer2DModel, SD3Transformer2DModel, FluxTransformer2DModel, UNet2DConditionModel, AutoencoderKL),
    *(CLIPTextModel, CLIPTextModelWithProjection, T5EncoderModel),
)
_NETWORKS = {kind.__name__: kind for kind in _KINDS} | {"Transformer2DModel": DiTTransformer2DModel}
_KEYS: dict[type, Callable[[State, Mapping[str, object]], State]] = {
    AutoencoderKL: vae_keys,
    CLIPTextModel: clip_keys,
    CLIPTextModelWithProjection: clip_keys,
}
"""(tensors of a file, the network's own) -> the tensors by the network's names, where files have had others."""


def has_weights(class_name: str) -> bool:
    """Whether the component is a network and not a tokenizer."""
    return class_name in _NETWORKS


def build_tokenizer(class_name: str, folder: Path) -> Any:
    """A tokenizer from its folder. Raises CheckpointError: its files are missing or not readable."""
    kind: Any = CLIPTokenizer if class_name in CLIP_TOKENIZER else T5Tokenizer
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

    outline: the tensors of its files, of which names, shapes and number formats are compared. file: where they are, if
    not in the folder. Raises CheckpointError: a class outside the allowlist, a corrupt config, other keys or shapes.
    """
    network = _without_weights(class_name, folder, len(outline))
    _, problems = _compared(type(network), network.state_dict(keep_vars=True), outline)
    _refuse(file or folder, problems)
    for module, name in _computed(network):
        if (count := module.get_buffer(name).numel()) > _BUFFER_LIMIT:
            raise CheckpointError(f"{folder / 'config.json'}: the buffer {name} would have {count} elements")
    return network.eval().requires_grad_(False)


def fill_network(
    network: nn.Module, where: Path, states: Iterable[State], device: torch.device, dtype: torch.dtype
) -> None:
    """Give a network on the meta device its own copy of the weights of these shards, one after another.

    where: the folder or file that errors name. Raises CheckpointError: names, shapes, or two tensors for one weight.
    """
    for state in states:
        _fill(network, where, state, device, dtype)
        del state  # and its map, before the next is made
    _refuse(where, [f"missing weights: {key}" for key, value in network.state_dict().items() if value.is_meta])
    for module, name in _computed(network):
        module.register_buffer(name, _buffer(module, name).to(device), persistent=False)


def _fill(network: nn.Module, where: Path, state: State, device: torch.device, dtype: torch.dtype) -> None:
    named, problems = _compared(type(network), network.state_dict(keep_vars=True), state, whole=False)
    _refuse(where, problems)
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


@cache
def network_of(class_name: str, folder: Path) -> nn.Module:
    """The network of a config.json without its weights, on the meta device; do not change it.

    The config is trusted to be as deep as it says, up to DEPTH. Raises CheckpointError.
    """
    return _without_weights(class_name, folder, DEPTH)


@cache
def outline_of(class_name: str, folder: Path) -> State:
    """Names and shapes of that network's tensors; do not change them. Raises CheckpointError as `network_of`."""
    return network_of(class_name, folder).state_dict(keep_vars=True)


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
    return _compared(_NETWORKS[class_name], outline_of(class_name, folder), outline)[1]


def _compared(kind: type, expected: State, state: State, whole: bool = True) -> tuple[State, list[str]]:
    """The tensors by the network's own names, and their differences from `expected`; not `whole`: some may be missing.

    expected: the network's own, of which two names of one tensor are the same object.
    """
    try:
        named = tied(_KEYS[kind](state, expected) if kind in _KEYS else state, expected)
    except ValueError as error:
        return {}, [str(error)]
    both = sorted(expected.keys() & named.keys())
    odd = [key for key in both if named[key].shape != expected[key].shape]
    return named, [
        *(f"missing weights: {key}" for key in sorted(expected.keys() - named.keys()) if whole),
        *(f"unexpected weights: {key}" for key in sorted(named.keys() - expected.keys())),
        *(f"{key} has shape {list(named[key].shape)}, not {list(expected[key].shape)}" for key in odd),
        *(f"{key} holds {named[key].dtype}, not floating point" for key in both if not named[key].is_floating_point()),
    ]


def tied(state: State, expected: State) -> State:
    """The tensors, each under all the names that `expected` has for one object: a file may have some of them.

    Raises ValueError naming the first of them that differs from another (none does on the meta device).
    """
    names: dict[int, list[str]] = {}
    for key, value in expected.items():
        names.setdefault(id(value), []).append(key)
    named = dict(state)
    for keys in names.values():
        first, *others = [key for key in keys if key in state] or [""]
        for key in others:
            if not _same(state[key], state[first]):
                raise ValueError(f"{key} is not equal to {first}, and this network has one tensor for both")
        named.update(dict.fromkeys(keys, state[first]) if first else {})
    return named


def _same(one: torch.Tensor, other: torch.Tensor) -> bool:
    return one.shape == other.shape and one.dtype == other.dtype and (one.is_meta or torch.equal(one, other))


def _refuse(where: Path, problems: Sequence[str]) -> None:
    """Raises CheckpointError naming the first of these problems."""
    if problems:
        more = f", and {len(problems) - 1} more differences" if len(problems) > 1 else ""
        raise CheckpointError(f"{where}: {problems[0]:.300}{more}")


def _without_weights(class_name: str, folder: Path, tensors: int) -> nn.Module:
    """The module on the meta device: neither memory nor random numbers are spent, and shapes are known."""
    if class_name not in _NETWORKS:
        raise CheckpointError(f'{folder}: the class "{class_name}" is not one that this server loads')
    kind = _NETWORKS[class_name]
    described = getattr(kind, "config_class", None)  # transformers' classes take a config, diffusers' its fields
    config = read_json(folder / "config.json")
    # NOTE: only the network's own fields pass. A config may also name an attention kernel to download, a dtype
    # (which transformers would make the default of the whole process while it builds), or other code.
    fields = described.__annotations__ if described else inspect.signature(kind.__init__).parameters
    known = {key: value for key, value in config.items() if key in fields and key != "self"}
    for key, value in known.items():
        if (depth := _depth(key, value)) > tensors:
            raise CheckpointError(f"{folder / 'config.json'}: {key} = {depth}, but the weights hold {tensors} tensors")
    try:
        with torch.device("meta"):
            network: nn.Module = kind(described(**known)) if described else kind(**known)
            if isinstance(network, DiTTransformer2DModel) and config.get("shared_embedders") is not False:
                share_embedders(network)
            if isinstance(network, T5EncoderModel):
                network.set_input_embeddings(network.shared)  # type: ignore[no-untyped-call]
            return network
    except Exception as error:
        raise CheckpointError(f"{folder / 'config.json'}: {kind.__name__} refuses it: {error}") from error


def _depth(key: str, value: Any) -> int:
    """The most blocks that a field of a config asks for in one place: entries of a list, and numbers of layers."""
    inner = [value] if isinstance(value, int) and "layers" in key else []
    if isinstance(value, list):
        inner = [len(value), *(_depth(key, one) for one in value)]
    return max(inner, default=0)


def _computed(network: nn.Module) -> list[tuple[nn.Module, str]]:
    """The buffers that no checkpoint has: their modules, and their names there."""
    return [(module, name) for module in network.modules() for name in sorted(module._non_persistent_buffers_set)]


def _buffer(module: nn.Module, name: str) -> torch.Tensor:
    if isinstance(module, CLIPTextEmbeddings) and name == "position_ids":
        return torch.arange(module.position_embedding.num_embeddings).expand((1, -1))
    if isinstance(module, PatchEmbed) and name == "pos_embed":
        grid = get_2d_sincos_pos_embed(
            module.proj.out_channels,
            module.height,
            base_size=module.base_size,
            interpolation_scale=module.interpolation_scale,
            output_type="pt",
        )
        return torch.as_tensor(grid).float().unsqueeze(0)
    raise CheckpointError(f"{type(module).__name__}.{name}: a buffer that this server cannot compute")
