"""Small whole numbers side by side in bytes."""

from __future__ import annotations

import torch
from torch import Tensor

BYTE = 8


def packed_size(count: int, bits: int) -> int:
    """Return how many bytes so many numbers take."""
    return -(-count * bits // BYTE)


def pack(numbers: Tensor, bits: int) -> Tensor:
    """Return numbers below ``2 ** bits`` as bytes, ``[rows, n] -> [rows, bytes]``, all uint8.

    The first number begins in the lowest bit of the first byte; what is over in the last is zero.

    >>> pack(torch.tensor([[1, 0, 1, 1, 0, 0, 0, 0, 1]], dtype=torch.uint8), 1)
    tensor([[13,  1]], dtype=torch.uint8)
    """
    if bits == BYTE:
        return numbers
    each = (numbers.unsqueeze(-1) >> _places(bits, numbers)) & 1
    stream = each.flatten(1)
    stream = torch.nn.functional.pad(stream, (0, -stream.shape[1] % BYTE))
    octets = stream.reshape(len(stream), -1, BYTE) << _places(BYTE, numbers)
    return octets.sum(2, dtype=torch.uint8)


def unpack(octets: Tensor, bits: int, count: int) -> Tensor:
    """Return the numbers that `pack` was given, ``[rows, bytes] -> [rows, count]``, uint8.

    Raises:
        ValueError: there are too few or too many bytes, or bits set beyond the last number.
    """
    if octets.shape[1] != packed_size(count, bits):
        raise ValueError(f"{octets.shape[1]} bytes instead of {packed_size(count, bits)}")
    if bits == BYTE:
        return octets
    stream = ((octets.unsqueeze(-1) >> _places(BYTE, octets)) & 1).flatten(1)
    if bool(stream[:, count * bits :].any()):
        raise ValueError("bits beyond the last number")
    each = stream[:, : count * bits].reshape(-1, count, bits) << _places(bits, octets)
    return each.sum(2, dtype=torch.uint8)


def _places(bits: int, like: Tensor) -> Tensor:
    return torch.arange(bits, dtype=torch.uint8, device=like.device)
