"""What a codec is: a pair of pure functions from a block to what travels, and back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Generic, NamedTuple, TypeVar

from torch import Tensor

P = TypeVar("P", bound=tuple[Tensor, ...])


class Codec(NamedTuple, Generic[P]):
    """What travels instead of a block; only the packed fields are sent and counted.

    `encode` is given a block ``[rows, d]`` and a key for each row, ``[rows]`` int64, for codecs
    which draw lots. The fields of what it returns have rows first, and types and shapes that
    depend on those of the block alone: a peer knows the size of a message before it comes.
    `decode` is given the fields and the number of parameters d, knows nothing else, and raises
    `ValueError` for what `encode` cannot have made. That fields are finite has been checked
    where they arrived; whether what is made of them is, the receiver looks itself.
    """

    encode: Callable[[Tensor, Tensor], P]
    decode: Callable[[P, int], Tensor]


class Dense(NamedTuple):
    """All entries of each row."""

    values: Tensor  # [rows, d]


def identity() -> Codec[Dense]:
    """Send everything: ``4 d`` bytes (float32)."""
    return Codec(lambda block, keys: Dense(block), lambda packed, d: packed.values)
