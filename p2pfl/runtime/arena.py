"""Memory which the ranks of one machine share: each writes its rows where all read them.

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

from p2pfl.runtime.parting import exchanging

SHARED = Path("/dev/shm")
SLOT = 16 << 20  # bytes of a slot for each rank; blocks of columns are a few megabytes
ALIGNED = 64  # bytes, at multiples of which tensors begin


class Arena:
    """Two slots, which are filled in turn.

    A slot is written by all ranks, each its own part, and read by all once they have met (`meet`);
    the next is written meanwhile. Who begins to write a slot again has met the others since, so
    they have done reading it, provided that nobody is more than one slot ahead of what it reads.

    Args:
        slots: uint8 ``[2, bytes]``.

    Attributes:
        bytes: of a slot.
    """

    def __init__(self, slots: Tensor) -> None:
        self._slots, self._turn = slots, 0
        self.bytes = slots.shape[1]

    def turn(self) -> None:
        """Go on to the other slot."""
        self._turn = 1 - self._turn

    def blocks(self, rows: int, like: Sequence[Tensor]) -> list[Tensor]:
        """Return blocks in the slot, ``[rows, ...]``, of the types and widths of others."""
        slot, blocks, at = self._slots[self._turn], [], 0
        for field in like:
            shape = (rows, *field.shape[1:])
            size = rows * _row_bytes(field)
            blocks.append(slot[at : at + size].view(field.dtype).view(shape))
            at += _aligned(size)
        return blocks

    def holds(self, rows: int, like: Sequence[Tensor]) -> bool:
        """Tell whether such blocks fit a slot."""
        return sum(_aligned(rows * _row_bytes(field)) for field in like) <= self.bytes

    @staticmethod
    @exchanging()
    def meet() -> None:
        """Wait until all ranks have written."""
        dist.all_reduce(torch.zeros(1))  # Gloo's barrier takes a millisecond every now and then


@exchanging()
def open_arena(rank: int, size: int) -> Arena | None:
    """Return the memory that all ranks share, or None where they are on several machines.

    All ranks must ask at the same time. The file goes as soon as all have opened it.
    """
    token = torch.tensor(secrets.randbits(62))
    dist.broadcast(token, 0)
    path, slot = SHARED / f"p2pfl-{int(token):x}", SLOT * size
    made = rank != 0 or _reserve(path, 2 * slot)
    dist.barrier()
    everybody = torch.tensor(int(made and path.exists()))
    dist.all_reduce(everybody, dist.ReduceOp.MIN)
    memory = None
    if everybody:
        memory = torch.from_file(str(path), shared=True, size=2 * slot, dtype=torch.uint8)
    dist.barrier()
    if rank == 0:
        path.unlink(missing_ok=True)
    return None if memory is None else Arena(memory.view(2, slot))


def _reserve(path: Path, size: int) -> bool:
    """Make a file of so many bytes for this user alone; False if there is no room."""
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        try:
            os.posix_fallocate(file, 0, size)  # a write without room would end the process
        finally:
            os.close(file)
    except OSError:
        return False
    return True


def _row_bytes(field: Tensor) -> int:
    return field.shape[1:].numel() * field.element_size()


def _aligned(size: int) -> int:
    return -(-size // ALIGNED) * ALIGNED
