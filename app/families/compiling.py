"""Compiling: torch.compile of a network's blocks, for any number of passes and any size."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from app.errors import SettingsError

VARIANTS = 64
"""Compiled forms kept of one block class: a last block, a single pass, every card's own widths are each a form."""


def allow_compiling(cache: Path) -> None:
    """Let this process compile, and keep what it compiles under `cache`. Call it before anything is compiled.

    Raises SettingsError: no C++ compiler.
    """
    # NOTE: on a GPU triton needs one too, to build its launchers.
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name):
        raise SettingsError("there is no C++ compiler (g++, clang++) here for torch.compile", param="compile")
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache.expanduser() / "compiled"))
    torch._dynamo.config.recompile_limit = VARIANTS


def compile_blocks(network: nn.Module, backend: str = "inductor") -> None:
    """Compile each block of the network at its first forward, all blocks of a kind once: seconds, not minutes.

    backend: one of torch.compile's. A whole network would be a little faster, but compiled for one number of passes.
    """
    for module in network.children():
        for block in module if isinstance(module, nn.ModuleList) else ():
            if block._compiled_call_impl is None:  # else another card has brought the same network
                block.compile(dynamic=True, backend=backend)


@contextmanager
def as_written(network: nn.Module) -> Iterator[None]:
    """Run blocks as they are written within this context: hooks on them must not be compiled while serving."""
    if all(block._compiled_call_impl is None for block in network.modules()):
        yield  # the stance would import the compiler, which takes seconds
        return
    with torch.compiler.set_stance("force_eager"):
        yield
