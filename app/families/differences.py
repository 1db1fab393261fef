"""Differences: how the tensors of a file differ from those of the network of a shipped config.json.

Knows nothing of cards or of where the tensors are; it reads no weights.
"""

from __future__ import annotations

from functools import cache
from pathlib import Path

import torch
from torch import nn

from app.errors import CheckpointError
from app.families.components import _NETWORKS, State, _without_weights

DEPTH = 1000
"""Blocks of the deepest network that is compared with anything."""


@cache
def outline_of(class_name: str, folder: Path) -> State:
    """Names and shapes of the network of a config.json, on the meta device; do not change it.

    The config is believed to be as deep as it says: it is one of the shipped ones. Raises CheckpointError.
    """
    if class_name not in _NETWORKS:
        raise CheckpointError(f'{folder}: the class "{class_name}" is not one that this server loads')
    return _without_weights(_NETWORKS[class_name], folder, DEPTH).state_dict(keep_vars=True)


def counts(class_name: str, folder: Path) -> tuple[int, int]:
    """Parameters of that network, as they are published; and all numbers that it keeps in memory.

    The second has buffers too (SD3's positions). What it holds under several names counts once.
    """
    own = {id(value): value for value in outline_of(class_name, folder).values()}.values()
    return sum(one.numel() for one in own if isinstance(one, nn.Parameter)), sum(one.numel() for one in own)


def differences(class_name: str, folder: Path, outline: State) -> list[str]:
    """What keeps these tensors from being that network's weights, a line each; none: they are.

    outline: of which only names, shapes and number formats are looked at. Raises CheckpointError as `outline_of`.
    """
    expected = outline_of(class_name, folder)
    try:
        named = _NETWORKS[class_name].keys(outline, expected)
    except ValueError as error:
        return [str(error)]
    return [
        *(f"{key} is missing" for key in sorted(expected.keys() - named.keys())),
        *(f"{key} is no tensor of the network" for key in sorted(named.keys() - expected.keys())),
        *(
            _shapes(key, named[key], expected[key])
            for key in sorted(expected.keys() & named.keys())
            if named[key].shape != expected[key].shape
        ),
        *(f"{key} holds {named[key].dtype}" for key in sorted(named) if not named[key].is_floating_point()),
    ]


def _shapes(key: str, own: torch.Tensor, wanted: torch.Tensor) -> str:
    return f"{key} has shape {list(own.shape)}, not {list(wanted.shape)}"
