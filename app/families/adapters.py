"""Adapters: LoRA weights of one model, and the forwards that add them to its linear layers and convolutions (Hu et al.
2021, arXiv:2106.09685). For a convolution, `down` is one with few outputs, and `up` one of 1 x 1. Weights are never
merged, so passes with different adapters share a forward.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from itertools import groupby
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.functional import conv2d, linear

from app.families.compiling import as_written, is_compiled

Pairs = Mapping[tuple[str, str], tuple[torch.Tensor, torch.Tensor]]
"""(part, module) -> (down [r, in] or [r, in, h, w] of a convolution, up [out, r]).

Modules with the same input may have one `down` object.
"""

SHARED = (("to_q", "to_k", "to_v"), ("add_q_proj", "add_k_proj", "add_v_proj"), ("q_proj", "k_proj", "v_proj"), "qkv")
"""Names of modules that get the same input where they have one parent and the input is as wide: one product with all
`down` serves them all. In cross-attention, keys and values do."""


class Place(NamedTuple):
    """What a module's output gets: the columns of the product of its input and `down`, times `up`; two parameters."""

    down: str
    up: str
    columns: slice


class LoRA(nn.Module):
    """The weights of one adapter for the networks of one model; on the meta device until they are filled.

    places: by network, then by the name of a module in it.
    """

    def __init__(self, pairs: Pairs, networks: Mapping[str, nn.Module]) -> None:
        """networks: by the names of the parts in `pairs`."""
        super().__init__()
        tensors, places = lay_out(pairs)
        for name, tensor in tensors.items():
            self.register_parameter(name, nn.Parameter(torch.empty_like(tensor, device="meta"), requires_grad=False))
        self.places: dict[nn.Module, dict[str, Place]] = {networks[part]: {} for part, _ in places}
        for (part, module), place in places.items():
            self.places[networks[part]][module] = place


def lay_out(pairs: Pairs) -> tuple[dict[str, torch.Tensor], dict[tuple[str, str], Place]]:
    """The parameters of a LoRA by their names, and the places of its modules.

    Parameters: `down` [R, in] or [R, in, h, w] for each input, with the rows of all modules that have it, and `up`
    [out, r] for each module. Modules with one `down` object share its rows.
    """
    downs: dict[str, list[torch.Tensor]] = {}
    ups: dict[str, torch.Tensor] = {}
    places = {}
    for (part, module), (down, up) in pairs.items():
        parent, _, leaf = module.rpartition(".")
        first = next((names[0] for names in SHARED if leaf in names), leaf)
        source, own = (f"{part}.{parent}.{name}".replace(".", "/") for name in (first, leaf))
        source = f"{source}/{down.shape[1]}"
        rows = downs.setdefault(f"{source}/down", [])
        nth = next((nth for nth, one in enumerate(rows) if one is down), len(rows))
        rows += [down] if nth == len(rows) else []
        start = sum(map(len, rows[:nth]))
        ups[f"{own}/up"] = up
        places[part, module] = Place(f"{source}/down", f"{own}/up", slice(start, start + len(down)))
    return {name: rows[0] if len(rows) == 1 else torch.cat(rows) for name, rows in downs.items()} | ups, places


Used = tuple[tuple[LoRA, float], ...]
"""The adapters of one image, in the order of their names, with their weights."""


class Span(NamedTuple):
    """Passes of a forward that one adapter changes, with their weights, float32 [passes, or 1 for all, 1, 1]."""

    passes: slice
    adapter: LoRA
    weights: torch.Tensor


def spans_of(used: Sequence[Used], device: torch.device, apart: bool = False) -> list[Span]:
    """The spans of a forward. used: the adapters of each pass; passes with the same ones are best side by side.

    apart: a span has one pass, so that the shapes of its products depend on that pass alone (deterministic mode).
    """
    spans, start = [], 0
    for key, group in groupby(enumerate(used), lambda one: (apart and one[0], [id(lora) for lora, _ in one[1]])):
        run = [adapters for _, adapters in group]
        for nth in range(len(key[1])):
            weights = torch.tensor([adapters[nth][1] for adapters in run], device=device).view(-1, 1, 1)
            spans.append(Span(slice(start, start + len(run)), run[0][nth][0], weights))
        start += len(run)
    return spans


def spans_of_all(used: Used, device: torch.device) -> list[Span]:
    """The spans of a forward in which all passes have these adapters."""
    return [Span(slice(None), lora, torch.full((1, 1, 1), weight, device=device)) for lora, weight in used]


class Change(NamedTuple):
    """What one span adds to the outputs of one module. source: names the product of its input and `down`."""

    source: tuple[int, str]
    passes: slice
    weights: torch.Tensor
    down: torch.Tensor
    up: torch.Tensor
    columns: slice


class Adapted:
    """The context in which a network's forwards add adapters: y = W x + weight * up (down x), for passes in spans.

    Passes are the first axis of every input. The modules that an adapter changes get a forward of their own within the
    context only, so that forwards without adapters run the network as it is.
    """

    def __init__(self, network: nn.Module, spans: Sequence[Span]) -> None:
        """The weights of the adapters must be there, and stay."""
        changes: dict[str, list[Change]] = {}
        tensors = {adapter: dict(adapter.named_parameters()) for _, adapter, _ in spans}
        for nth, (passes, adapter, weights) in enumerate(spans):
            for name, (down, up, columns) in adapter.places.get(network, {}).items():
                own = tensors[adapter]
                one = Change((nth, down), passes, weights, own[down], own[up].T, columns)
                changes.setdefault(name, []).append(one)
        self._changes = [(network.get_submodule(name), one) for name, one in changes.items()]
        self._compiled, self._network, self._stack = is_compiled(network), network, ExitStack()
        self._input: torch.Tensor | None = None
        self._products: dict[tuple[int, str], torch.Tensor] = {}

    def __enter__(self) -> None:
        if self._compiled:
            self._stack.enter_context(as_written(self._network))
        for module, changes in self._changes:  # only now: no cycle of references keeps the weights
            vars(module)["forward"] = partial(self._forward, module, changes)

    def __exit__(self, *_: object) -> None:
        for module, _changes in self._changes:
            vars(module).pop("forward", None)
        self._input, self._products = None, {}
        self._stack.close()

    def _forward(self, module: nn.Module, changes: list[Change], x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = type(module).forward(module, x)
        if self._input is not x:
            self._input, self._products = x, {}
        for source, passes, weights, down, up, columns in changes:
            product = self._products.get(source)
            if product is None:
                product = _thin(module, x[passes], down).mul_(weights.view(-1, *[1] * (x.ndim - 1)))
                self._products[source] = product
            if isinstance(module, nn.Conv2d):
                y[passes] += conv2d(product[:, columns], up.T[..., None, None])
            else:
                y[passes].view(-1, y.shape[-1]).addmm_(product[..., columns].flatten(0, -2), up)
        return y


def _thin(module: nn.Module, x: torch.Tensor, down: torch.Tensor) -> torch.Tensor:
    """Apply `down` to the module's input, in the way the module applies its own weight, without a bias."""
    if isinstance(module, nn.Conv2d):
        return conv2d(x, down, None, module.stride, module.padding, module.dilation)
    return linear(x, down)
