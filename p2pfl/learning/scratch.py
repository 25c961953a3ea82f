"""Memory that is used again: to be given new pages costs more than to fill them."""

from __future__ import annotations

import ctypes
import gc
import math
import mmap
import threading
import weakref
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

# Of glibc's mallopt, see malloc.h.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST = 32 << 20  # glibc takes no more for blocks which it keeps
_LARGE = 1 << 20  # bytes from which on a block is worth the bookkeeping
_KEPT = 256 << 20  # bytes that are kept at the end of its memory
_SELDOM = 50_000  # objects, made and not yet gone, after which Python looks for cycles


class Scratch(threading.local):
    """Blocks of memory by use, each thread its own; what is in one is lost at its next use."""

    def __init__(self) -> None:
        self._held: dict[str, Tensor] = {}

    def of(self, use: str, shape: tuple[int, ...], like: Tensor, dtype: torch.dtype) -> Tensor:
        """Return memory of a shape and a type on the device of `like`."""
        size, held = math.prod(shape), self._held.get(use)
        if held is None or len(held) < size or (held.dtype, held.device) != (dtype, like.device):
            held = self._held[use] = like.new_empty(size, dtype=dtype)
        return held[:size].view(shape)


class Pool:
    """Large blocks of the CPU's memory, each used again once nobody holds it any more.

    Any thread may take one, and let go of one.

    Args:
        most: bytes that are kept for that, in blocks of each size; but always two blocks.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._free: dict[int, deque[mmap.mmap]] = {}

    def empty(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return a block whose contents are whatever they are."""
        size = math.prod(shape) * dtype.itemsize
        if size < _LARGE:
            return torch.empty(shape, dtype=dtype)
        free = self._free.setdefault(size, deque(maxlen=max(2, self._most // size)))
        try:
            memory = free.pop()
        except IndexError:
            memory = mmap.mmap(-1, size)
            if hasattr(mmap, "MADV_HUGEPAGE"):
                memory.madvise(mmap.MADV_HUGEPAGE)
        array = np.frombuffer(memory, dtype=np.uint8)
        # Tensors that share the memory hold the array, and nothing else does.
        weakref.finalize(array, free.append, memory).atexit = False
        return torch.from_numpy(array).view(dtype).view(shape)


def keep_freed_memory() -> None:
    """Have the C library keep what is freed rather than give it back and ask again.

    All threads share it: a model lives on after the thread that has made it is at the next,
    and what it leaves would else be of use to that thread alone. With glibc; elsewhere nothing
    happens.
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (OSError, AttributeError):
        return
    mallopt(_MMAP_THRESHOLD, _LARGEST)
    mallopt(_TRIM_THRESHOLD, _KEPT)
    mallopt(_ARENA_MAX, 1)


@contextmanager
def seldom_collected() -> Iterator[None]:
    """Have Python look for garbage that holds itself only now and then, meanwhile.

    Where thousands of messages are on their way at once, it would look through all of them
    again and again, and find nothing.
    """
    first, *others = gc.get_threshold()
    gc.set_threshold(max(_SELDOM, first), *others)
    try:
        yield
    finally:
        gc.set_threshold(first, *others)
