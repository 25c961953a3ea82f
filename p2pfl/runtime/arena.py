"""Memory which the ranks of one machine share: they leave rows for each other where they are read.

Through a socket every row would be copied twice more, which costs as much as mixing it.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

SHARED = Path("/dev/shm")
SLOT = 16 << 20  # bytes; blocks of columns are a few megabytes
ALIGNED = 64  # bytes, at multiples of which tensors begin


class Arena:
    """Two slots of every rank, which are filled in turn.

    A slot is written by all ranks, and read by its owner once all have met (`meet`); the next
    is written meanwhile. Who begins to write a slot again has met the others since, so they
    have done reading it, provided that nobody is more than one slot ahead of what it reads.

    Args:
        slots: of every rank, uint8 ``[2, SLOT]``.
    """

    def __init__(self, slots: Sequence[Tensor]) -> None:
        self._slots, self._turn = slots, 0

    def turn(self) -> None:
        """Go on to the other slot."""
        self._turn = 1 - self._turn

    def blocks(self, rank: int, rows: int, like: Sequence[Tensor]) -> list[Tensor]:
        """Return blocks in a rank's slot, ``[rows, ...]``, of the types and widths of others."""
        slot, blocks, at = self._slots[rank][self._turn], [], 0
        for field in like:
            shape = (rows, *field.shape[1:])
            size = rows * _row_bytes(field)
            blocks.append(slot[at : at + size].view(field.dtype).view(shape))
            at += _aligned(size)
        return blocks

    @staticmethod
    def holds(rows: int, like: Sequence[Tensor]) -> bool:
        """Tell whether such blocks fit a slot."""
        return sum(_aligned(rows * _row_bytes(field)) for field in like) <= SLOT

    @staticmethod
    def meet() -> None:
        """Wait until all ranks have written."""
        dist.barrier()


def open_arena(rank: int, size: int) -> Arena | None:
    """Return the memory that all ranks share, or None where they are on several machines.

    All ranks must ask at the same time. The files go as soon as all have opened them.
    """
    token = torch.tensor(secrets.randbits(62))
    dist.broadcast(token, 0)
    paths = [SHARED / f"p2pfl-{int(token):x}-{each}" for each in range(size)]
    made = _reserve(paths[rank])
    dist.barrier()
    everybody = torch.tensor(int(made and all(path.exists() for path in paths)))
    dist.all_reduce(everybody, dist.ReduceOp.MIN)
    arena = Arena([_slots(path) for path in paths]) if everybody else None
    dist.barrier()
    paths[rank].unlink(missing_ok=True)
    return arena


def _reserve(path: Path) -> bool:
    """Make a file of two slots for this user alone; False if there is no room."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(file, 0, 2 * SLOT)  # a write without room would end the process
        finally:
            os.close(file)
    except OSError:
        return False
    return True


def _slots(path: Path) -> Tensor:
    return torch.from_file(str(path), shared=True, size=2 * SLOT, dtype=torch.uint8).view(2, SLOT)


def _row_bytes(field: Tensor) -> int:
    return field.shape[1:].numel() * field.element_size()


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
