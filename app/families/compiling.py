"""Compiling: torch.compile of a network's blocks, for any number of passes and any size."""

import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn

from app.errors import SettingsError

PROBE = 1 << 20
"""Bytes that a folder must have room for, so that what is compiled goes there."""

VARIANTS = 64
"""Compiled forms kept of one block class: a last block, a single pass, every card's own widths are each a form."""

log = logging.getLogger("instep.worker")


def allow_compiling(cache: Path) -> None:
    """Let this process compile, and keep what it compiles under `cache`. Call it before anything is compiled.

    Where `cache` cannot be written, torch's own folder of temporary files takes its place, and the log says so.
    Raises SettingsError: no C++ compiler.
    """
    # NOTE: on a GPU triton needs one too, to build its launchers.
    if not any(shutil.which(name) for name in (os.environ.get("CXX", ""), "g++", "clang++") if name):
        raise SettingsError("there is no C++ compiler (g++, clang++) here for torch.compile", param="compile")
    folder = cache.expanduser() / "compiled"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(PROBE))
        # NOTE: whatever it is now: the import of diffusers makes torch write its own folder into the environment.
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(folder)
    except OSError as error:
        log.warning("%s cannot be written (%s): what is compiled is not kept", folder, error.strerror)
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
    if not is_compiled(network):
        yield  # the stance would import the compiler, which takes seconds
        return
    with torch.compiler.set_stance("force_eager"):
        yield


def is_compiled(network: nn.Module) -> bool:
    """Whether `compile_blocks` was called for it."""
    return any(block._compiled_call_impl is not None for block in network.modules())
