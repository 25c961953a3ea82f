"""Lossy compression: pairs of pure functions from a block to what travels."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Generic, NamedTuple, TypeVar

from torch import Tensor

from p2pfl import rng

P = TypeVar("P", bound=tuple[Tensor, ...])


class Codec(NamedTuple, Generic[P]):
    """What travels instead of a block; only the packed fields are sent and counted.

    `encode` is given a key for each row, for codecs which draw lots. `decode` is given the
    number of parameters, and raises `ValueError` for what `encode` cannot have made.
    """

    encode: Callable[[Tensor, Tensor], P]
    decode: Callable[[P, int], Tensor]


class Dense(NamedTuple):
    """All entries of each row."""

    values: Tensor  # [rows, d]


class Sparse(NamedTuple):
    """The entries of each row which were kept."""

    values: Tensor  # [rows, k]
    columns: Tensor  # [rows, k], int32, ascending


def identity() -> Codec[Dense]:
    """Send everything: ``4 d`` bytes (float32)."""
    return Codec(lambda block, keys: Dense(block), lambda packed, d: packed.values)


def top_k(k: int | None = None, share: float | None = None) -> Codec[Sparse]:
    """Keep the `k` entries of each row, or the given `share`, that are largest in magnitude.

    ``8 k`` bytes (float32). Loses at most ``1 - k/d`` of the squared norm.
    """
    width = _width(k, share)
    return Codec(lambda block, keys: _keep(block, block.abs(), width), _spread)


def random_k(k: int | None = None, share: float | None = None) -> Codec[Sparse]:
    """Keep `k` entries of each row, or the given `share`, drawn anew each time.

    ``8 k`` bytes (float32). Loses ``1 - k/d`` of the squared norm in expectation.
    """
    width = _width(k, share)

    def encode(block: Tensor, keys: Tensor) -> Sparse:
        return _keep(block, rng.uniform(keys, block.shape[1]), width)

    return Codec(encode, _spread)


CODECS: dict[str, Callable[..., Codec[Any]]] = {
    "identity": identity,
    "random_k": random_k,
    "top_k": top_k,
}


def _width(k: int | None, share: float | None) -> Callable[[int], int]:
    if (k is None) == (share is None):
        raise ValueError("give either k (a number of entries) or share (a part of them)")
    if k is not None:
        if k < 1:
            raise ValueError(f"k = {k} is below 1")
        return lambda d: min(k, d)
    assert share is not None
    if not 0 < share <= 1:
        raise ValueError(f"share = {share} is not in (0, 1]")
    return lambda d: max(1, round(share * d))


def _keep(block: Tensor, score: Tensor, width: Callable[[int], int]) -> Sparse:
    # Sorted columns make a message independent of the order a top-k kernel happens to return.
    columns = score.topk(width(block.shape[1]), dim=1).indices.sort(dim=1).values
    return Sparse(block.gather(1, columns), columns.int())


def _spread(packed: Sparse, d: int) -> Tensor:
    columns = packed.columns.long()
    if columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < d:
        raise ValueError(f"a column outside 0..{d - 1}")
    dense = packed.values.new_zeros(len(packed.values), d)
    return dense.scatter(1, columns, packed.values)
