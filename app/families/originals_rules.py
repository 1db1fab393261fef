"""Rules: how tensors by an author's names become tensors by diffusers' names. A layout is a table of them.

Knows nothing of any layout (originals_tables.py) nor of files.

In a name that a rule reads, `#` is an index, `$` the highest index that stands in this place, and `*` is weight or
bias; `**` is all that is left. In the names that it gives, `#`, `*` and `**` are what was read, in the order read; `~`
is the first index counted from the highest; `%` is every index there is in the place of the rule's `every`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch

Tensors = Mapping[str, torch.Tensor]
Change = Callable[[str, torch.Tensor, Tensors], list[torch.Tensor]]
"""(key, tensor, all tensors by the authors' names) -> the tensors of the names given. Raises ValueError."""

_TOKENS = {"#": r"(0|[1-9][0-9]{0,3})", "$": r"(0|[1-9][0-9]{0,3})", "*": r"(weight|bias)", "**": r"(.*)"}


def same(key: str, tensor: torch.Tensor, state: Tensors) -> list[torch.Tensor]:
    """As it is."""
    return [tensor]


def thirds(key: str, tensor: torch.Tensor, state: Tensors) -> list[torch.Tensor]:
    """A fused q, k, v: three views."""
    if tensor.ndim not in (1, 2) or tensor.shape[0] % 3 or not tensor.shape[0]:
        raise ValueError(f"{key} has shape {list(tensor.shape)}, which does not split into q, k and v")
    return list(tensor.chunk(3))


def swapped(key: str, tensor: torch.Tensor, state: Tensors) -> list[torch.Tensor]:
    """(shift, scale) becomes (scale, shift): a copy."""
    if tensor.ndim not in (1, 2) or tensor.shape[0] % 2 or not tensor.shape[0]:
        raise ValueError(f"{key} has shape {list(tensor.shape)}, which does not split into shift and scale")
    shift, scale = tensor.chunk(2)
    return [torch.cat((scale, shift))]


def matrix(key: str, tensor: torch.Tensor, state: Tensors) -> list[torch.Tensor]:
    """A convolution of one pixel becomes a linear layer: a view."""
    if tensor.ndim == 4 and tensor.shape[2:] != (1, 1):
        raise ValueError(f"{key} has shape {list(tensor.shape)}, which is not a convolution of one pixel")
    return [tensor[:, :, 0, 0] if tensor.ndim == 4 else tensor]


@dataclass(frozen=True, slots=True)
class Rule:
    """What `key` becomes: nothing, one tensor for each of `names`, or one for every index in the place of `every`."""

    key: str
    names: tuple[str, ...]
    change: Change = same
    every: str = ""

    def pattern(self) -> re.Pattern[str]:
        """A name that this rule reads; its groups are its indices and weight or bias."""
        pieces = re.split(r"(\*\*|[#$*])", self.key)
        return re.compile("".join(_TOKENS.get(piece, re.escape(piece)) for piece in pieces))


def rename(key: str, name: str, change: Change = same, every: str = "") -> Rule:
    """One tensor, by one other name."""
    return Rule(key, (name,), change, every)


def split(key: str, *names: str, change: Change = thirds) -> Rule:
    """One tensor that holds several."""
    return Rule(key, names, change)


def drop(key: str) -> Rule:
    """Not of the network."""
    return Rule(key, ())


def check(key: str, verify: Callable[[str, torch.Tensor, Tensors], None]) -> Rule:
    """Not of the network either, which computes it: `verify` raises ValueError where the two differ."""

    def verified(name: str, tensor: torch.Tensor, state: Tensors) -> list[torch.Tensor]:
        verify(name, tensor, state)
        return []

    return Rule(key, (), verified)


def apply(rules: Iterable[Rule], state: Tensors) -> dict[str, torch.Tensor]:
    """The state by the names that the rules give: views, but for what is swapped. On the meta device too.

    Raises ValueError naming the key: one that no rule reads, a shape that cannot be split, two tensors of one name.
    """
    compiled = [(rule, rule.pattern()) for rule in rules]
    found: dict[str, torch.Tensor] = {}
    last: dict[str, int] = {}
    for key, tensor in state.items():
        rule, match = _rule(compiled, key, state, last)
        changed = rule.change(key, tensor, state)
        for name, piece in zip(rule.names, changed, strict=bool(rule.names)):
            for full in _named(rule, name, match, state, last):
                if full in found:
                    raise ValueError(f"{key}: {full} stands in the file twice")
                found[full] = piece
    return found


def _rule(rules: Any, key: str, state: Tensors, last: dict[str, int]) -> tuple[Rule, re.Match[str]]:
    """The first rule that reads this key."""
    for rule, pattern in rules:
        match = pattern.fullmatch(key)
        head, marked, _ = rule.key.partition("$")
        if match and (not marked or int(match[1]) == _highest(head, state, last)):
            return rule, match
    raise ValueError(f"unexpected weights: {key}")


def _named(rule: Rule, name: str, match: re.Match[str], state: Tensors, last: dict[str, int]) -> Iterator[str]:
    read = iter(match.groups())
    head = re.split(r"[#$]", rule.key)[0]
    if "~" in name:
        name = name.replace("~", str(_highest(head, state, last) - int(next(read))))
    named = re.sub(r"\*\*|[#*]", lambda _: next(read), name)
    if "%" not in named:
        yield named
        return
    for index in range(_highest(rule.every, state, last) + 1):
        yield named.replace("%", str(index))


def _highest(head: str, state: Tensors, last: dict[str, int]) -> int:
    """The highest index after `head` in the names of the state; counted once. Raises ValueError: indices are left out,
    which would also let a name ask for any number of copies."""
    if head not in last:
        pattern = re.compile(re.escape(head) + r"(0|[1-9][0-9]{0,3})\.")
        indices = {int(match[1]) for key in state if (match := pattern.match(key))}
        if indices != set(range(len(indices))):
            absent = min(set(range(len(indices))) - indices)
            raise ValueError(f"missing weights: {head}{absent}, though it has {head}{max(indices)}")
        last[head] = len(indices) - 1
    return last[head]
