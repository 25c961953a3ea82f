"""How much memory a block of rows may take up while it is trained."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import torch

UNKNOWN = 32 << 20  # taken for the size of a last-level cache that the machine does not tell
_UNITS = {"K": 1 << 10, "M": 1 << 20}
ACCELERATOR = 1 << 30  # which has memory instead of a cache, and wants wide products


def cache_bytes(device: torch.device, threads: int | None = None) -> int:
    """Return the bytes of parameters and examples that a thread best works on together.

    Args:
        device: where it works.
        threads: how many work on something else each; None: as many as torch has.
    """
    if device.type != "cpu":
        return ACCELERATOR
    # torchrun tells how many processes it has started here; they share the cache.
    sharing = (threads or torch.get_num_threads()) * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return _last_level() // sharing


@cache
def _last_level() -> int:
    """Return the size of the processor's largest cache in bytes, as Linux tells it."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        number, unit = file.read_text().strip()[:-1], file.read_text().strip()[-1:]
        if number.isdigit() and unit in _UNITS:
            sizes.append(int(number) * _UNITS[unit])
    return max(sizes, default=UNKNOWN)
