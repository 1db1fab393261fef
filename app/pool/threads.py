"""Threads: how many of the CPU's cores one thread computes with.

Knows nothing of which threads there are or of how many each should get.
"""

from __future__ import annotations

import torch


def use_threads(count: int) -> None:
    """So many for what this thread computes, whatever other threads ask for before or after.

    NOTE: a thread takes the number that was set last anywhere in the process when it first computes or asks for it,
    hence the question here. What is at stake: with more threads than cores in all, OpenMP lets each thread fall asleep
    after every parallel region, and an engine whose loader had a second one drew at half its speed.
    """
    torch.set_num_threads(count)
    torch.get_num_threads()
