"""Authors: the layouts in which the authors of networks publish them, and their tensors by diffusers' names.

A layout is a table of rules in `authors.toml`, which says how they are written.
"""

import re
import tomllib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, lru_cache
from math import isqrt
from pathlib import Path
from typing import Any, Self

import torch
from diffusers.models.embeddings import get_2d_sincos_pos_embed

from app.families.text import State

Tensors = Mapping[str, torch.Tensor]
Change = Callable[[torch.Tensor, Tensors], Iterable[torch.Tensor]]
"""(tensor, all tensors by the authors' names) -> the tensors of the rule's names. Raises when the shape is wrong."""

Rule = tuple[str, tuple[str, ...], Change | None]
"""A key, the names that its tensor gets, and how it is changed; None: it stays as it is."""

POSITIONS_TOLERANCE = 1e-2
"""Bound of the error of a stored position embedding, which has sines: bfloat16 keeps them to 4e-3."""

_FILE = Path(__file__).with_suffix(".toml")
_INDEX = r"(0|[1-9][0-9]{0,3})"
_TOKENS = {"#": _INDEX, "$": _INDEX, "{": _INDEX, "*": r"(weight|bias)", "**": r"(.*)"}
_TOKEN = re.compile(r"(\*\*|[#$*]|\{\d\+\d\}|\(.*?\))")


def thirds(tensor: torch.Tensor, state: Tensors) -> Iterable[torch.Tensor]:
    """Three views of a fused q, k, v."""
    return tensor.reshape(3, -1, *tensor.shape[1:]).unbind()


def fused(tensor: torch.Tensor, state: Tensors) -> Iterable[torch.Tensor]:
    """Views of FLUX's fused q, k, v and MLP: three times the width, then at least one row that is left."""
    width = state["img_in.weight"].shape[0]
    return torch.split(tensor, [width, width, width, max(tensor.shape[0] - 3 * width, 1)])


def swapped(tensor: torch.Tensor, state: Tensors) -> Iterable[torch.Tensor]:
    """A copy of (shift, scale) as (scale, shift)."""
    return (tensor.reshape(2, -1, *tensor.shape[1:]).flip(0).flatten(0, 1),)


def matrix(tensor: torch.Tensor, state: Tensors) -> Iterable[torch.Tensor]:
    """A view of a convolution of one pixel as a linear layer."""
    return (tensor.view(tensor.shape[:2]),)


def transposed(tensor: torch.Tensor, state: Tensors) -> Iterable[torch.Tensor]:
    """A view of x @ w as a linear layer's weight."""
    return (tensor.mT,)


def positions(tensor: torch.Tensor, state: Tensors) -> Iterable[torch.Tensor]:
    """Nothing: the network computes its position embedding, from which a stored one must not differ."""
    side = isqrt(tensor.shape[1])
    stored = tensor.reshape(1, side**2, -1, 4).flatten(2)[0].float()
    if not tensor.is_meta:
        computed = torch.as_tensor(get_2d_sincos_pos_embed(stored.shape[1], side, base_size=side, output_type="pt"))
        if not (stored - computed.float()).abs().max() <= POSITIONS_TOLERANCE:
            raise ValueError(f"is not the sines and cosines of {side} by {side} places that the network computes")
    return ()


_NOT: dict[Change, str] = {
    thirds: "does not split into q, k and v",
    fused: "does not split into q, k, v and the MLP",
    swapped: "does not split into shift and scale",
    matrix: "is not a convolution of one pixel",
    transposed: "is not a matrix",
    positions: "is not [1, side * side, width]",
}
"""The error where a tensor's shape does not allow a change."""

_CHANGES: dict[str, Change | None] = {"renamed": None, **{change.__name__: change for change in _NOT}}
"""How the rules of a table change their tensors, by the table's name."""


def rule(key: str, *names: str, change: Change | None = None) -> Rule:
    """A rule that renames or splits a tensor; without names it drops it."""
    return key, names, change


def apply(rules: Sequence[Rule], state: Tensors) -> State:
    """The state by the names that the rules give: views, but for what is swapped. On the meta device too.

    Raises ValueError naming the key: one that no rule reads, a shape that cannot be split, two tensors of one name.
    """
    highest = cache(lambda head: _highest(head, state))
    found: State = {}
    for key, tensor in state.items():
        match, (pattern, names, change) = _rule(rules, key, highest)
        pieces = _pieces(key, tensor, change, state) if change else [tensor]
        for name, piece in zip(names, pieces, strict=bool(names)):
            for full in _named(pattern, name, match, highest):
                if full in found:
                    raise ValueError(f"{key}: {full} stands in the file twice")
                found[full] = piece
    return found


def _pieces(key: str, tensor: torch.Tensor, change: Change, state: Tensors) -> Iterable[torch.Tensor]:
    try:
        return change(tensor, state)
    except (RuntimeError, LookupError) as error:
        raise ValueError(f"{key} has shape {list(tensor.shape)}, which {_NOT[change]}") from error
    except ValueError as error:
        raise ValueError(f"{key} {error}") from error


@cache
def _pattern(key: str, dot: str = r"\.") -> re.Pattern[str]:
    """The names that a rule of this key reads; groups are indices, words and endings. dot: what stands for its dots."""
    pieces = (one[:1] if one[:1] == "{" else one for one in _TOKEN.split(key))
    words = (_TOKENS.get(one) or (one if one[:1] == "(" else re.escape(one).replace(r"\.", dot)) for one in pieces)
    return re.compile("".join(words))


def _rule(
    rules: Sequence[Rule], key: str, highest: Callable[[str], int], dot: str = r"\."
) -> tuple[re.Match[str], Rule]:
    for one in rules:
        match = _pattern(one[0], dot).fullmatch(key)
        head, marked, _ = one[0].partition("$")
        if match and (not marked or int(match[1]) == highest(head)):
            return match, one
    raise ValueError(f"unexpected weights: {key}")


def _named(key: str, name: str, match: re.Match[str], highest: Callable[[str], int]) -> Iterator[str]:
    """The names, which are more than one where `name` has a `%`."""
    read: dict[str, list[str]] = {"#": [], "&": [], "*": [], "**": []}
    for token, text in zip(_TOKEN.findall(key), match.groups(), strict=True):
        if token[0] == "{":
            read["#"] += map(str, divmod(int(text) - int(token[1]), int(token[3])))
        else:
            read[{"$": "#", "(": "&"}.get(token[0], token)].append(text)
    if "~" in name:
        name = name.replace("~", str(highest(key.partition("#")[0]) - int(read["#"].pop(0))))
    named = re.sub(r"\*\*|[#*&]", lambda found: read[found[0]].pop(0), name)
    for index in range(highest("blocks.") + 1 if "%" in named else 1):
        yield named.replace("%", str(index))


def _highest(head: str, state: Tensors) -> int:
    """The highest index after `head` in the names of the state. Raises ValueError: indices are left out, which would
    also let a name ask for any number of copies."""
    pattern = re.compile(re.escape(head) + _INDEX + r"\.")
    indices = {int(match[1]) for key in state if (match := pattern.match(key))}
    if absent := set(range(len(indices))) - indices:
        raise ValueError(f"missing weights: {head}{min(absent)}, though it has {head}{max(indices)}")
    return len(indices) - 1


@dataclass(frozen=True, slots=True)
class Layout:
    """One part as its authors' files name it; the fields are those of `authors.toml`.

    prefix: the one of `prefixes` that the file at hand uses.
    """

    name: str
    parts: Sequence[str]
    classes: Sequence[str]
    prefixes: Sequence[str]
    signs: Sequence[str]
    rules: Sequence[Rule]
    family: str | None = None
    prefix: str = ""

    def within(self, keys: Collection[str]) -> Self | None:
        """This layout with the prefix that it has among these names of a file; None if it is not among them."""
        found = (prefix for prefix in self.prefixes if all(prefix + sign in keys for sign in self.signs))
        return next((replace(self, prefix=prefix) for prefix in found), None)

    def read(self, class_name: str, state: Tensors) -> State:
        """The part's tensors by diffusers' names, from all tensors of the file; other parts are left alone.

        Views, but for what diffusers has in another order. Raises ValueError naming the key.
        """
        own = {key[len(self.prefix) :]: value for key, value in state.items() if key.startswith(self.prefix)}
        try:
            found = apply(self.rules, own)
        except ValueError as error:
            after = f" after {self.prefix}" if self.prefix else ""
            raise ValueError(f"{error!s:.400} (in the layout of {self.name}{after})") from error
        norm = own.get("text_model.final_layer_norm.weight")
        unprojected = class_name == "CLIPTextModelWithProjection" and "text_projection.weight" not in found
        if unprojected and norm is not None and norm.ndim == 1:
            found["text_projection.weight"] = torch.eye(norm.shape[0], dtype=norm.dtype, device=norm.device)
        return found


def _layout(name: str, facts: dict[str, Any], others: Mapping[str, Layout]) -> Layout:
    tables = {kind: facts.pop(kind) for kind in list(facts) if kind in _CHANGES}
    lines = ((key, names, _CHANGES[kind]) for kind, table in tables.items() for key, names in table.items())
    rules = [rule(key, *names.split(), change=change) for key, names, change in lines]
    rest = others[facts.pop("rest")].rules if "rest" in facts else ()
    return Layout(name, rules=[*rules, *rest], **facts)


def _layouts(text: str) -> list[Layout]:
    found: dict[str, Layout] = {}
    for name, facts in tomllib.loads(text).items():
        found[name] = _layout(name, facts, found)
    return list(found.values())


LAYOUTS = _layouts(_FILE.read_text(encoding="utf-8"))


def parts_in(keys: Collection[str]) -> dict[str, Layout]:
    """The parts that a file with these names holds, by their names in a model_index.json.

    A T5 is text_encoder_2 beside a transformer of FLUX, and text_encoder_3 alone; a CLIP alone is text_encoder.
    """
    found = [one for layout in LAYOUTS if (one := layout.within(keys)) is not None]
    flux = any(one.family == "flux" for one in found)
    return {one.parts[-1 if flux and one.name == "T5" else 0]: one for one in reversed(found)}


def find_part(part: str, class_name: str, keys: Collection[str]) -> Layout:
    """The layout of this part in a file with these names. Raises ValueError naming the parts that it has."""
    for layout in LAYOUTS:
        if part in layout.parts and class_name in layout.classes and (found := layout.within(keys)) is not None:
            return found
    others = sorted(f"{name} ({one.name})" for name, one in parts_in(keys).items())
    contents = f"it holds {', '.join(others)}" if others else "no part of a known layout is in it"
    raise ValueError(f"no {part} of class {class_name}: {contents}")


def from_original(class_name: str, state: Tensors, part: str = "transformer") -> State:
    """The tensors of one part by diffusers' names, from all tensors of a file in its authors' layout.

    part: its name in a model_index.json. The tensors are views, but for those that diffusers has in another order; they
    may be on the meta device. Raises ValueError naming the key, or the parts that the file has.
    """
    return find_part(part, class_name, state.keys()).read(class_name, state)


@lru_cache(10_000)
def modules_of(class_name: str, name: str, blocks: int) -> tuple[tuple[str, ...], bool]:
    """The modules that its authors have as one of this name, and whether the halves of its rows are swapped here.

    name: with dots or underscores. blocks: of the network. There are no modules where no rule reads the name.
    """
    layouts = [layout for layout in LAYOUTS if layout.family and class_name in layout.classes]
    rules = [one for layout in layouts for one in layout.rules]
    try:
        match, (key, names, change) = _rule(rules, f"{name}.weight", lambda head: blocks - 1, dot="[._]")
    except ValueError:
        return (), False
    named = (next(_named(key, one, match, lambda head: 0)) for one in names)
    return tuple(one.removesuffix(".weight") for one in named), change is swapped
