"""Keep what matters at several scales: the largest coefficients of Haar's wavelets."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from p2pfl.codec.base import Codec
from p2pfl.codec.sparse import Indices, Kept, keeper, kept_columns, listed, spread


def wavelet(
    k: int | None = None,
    share: float | None = None,
    levels: int = 4,
    indices: Indices = "list",
) -> Codec[Kept]:
    """Keep the `k` largest coefficients of each row's Haar transform, or the given `share`.

    Parameters that lie next to each other often change alike, and then few coefficients say it.
    Loses at most ``1 - k/d`` of the squared norm, as `top_k`, and takes as many bytes; d is
    rounded up to a multiple of 2^levels.
    """
    check_levels(levels)
    keep = keeper(k, share)

    def encode(block: Tensor, keys: Tensor) -> Kept:
        coefficients = haar(block, levels)
        kept = listed(coefficients, keep(coefficients.abs()), indices)
        return kept._replace(values=kept.values.to(block.dtype))

    def decode(packed: Kept, d: int) -> Tensor:
        width = padded(d, levels)
        values = packed.values
        return inverse_haar(spread(values, kept_columns(packed, width), width), levels)[:, :d]

    return Codec(encode, decode)


def padded(d: int, levels: int) -> int:
    """Return how many coefficients d numbers have."""
    return -(-d >> levels) << levels


def haar(block: Tensor, levels: int) -> Tensor:
    """Return the orthonormal Haar transform of each row (Haar 1910).

    ``[rows, d] -> [rows, padded(d, levels)]``, the coarsest coefficients first. Zeros stand
    after the last number.
    """
    rest = torch.nn.functional.pad(block, (0, padded(block.shape[1], levels) - block.shape[1]))
    details: list[Tensor] = []
    for _ in range(levels):
        even, odd = rest[:, ::2], rest[:, 1::2]
        details.append((even - odd) * math.sqrt(0.5))
        rest = (even + odd) * math.sqrt(0.5)
    return torch.cat([rest, *reversed(details)], dim=1)


def inverse_haar(coefficients: Tensor, levels: int) -> Tensor:
    """Return the rows of which these are the coefficients, zeros at their ends included."""
    width = coefficients.shape[1] >> levels
    rest = coefficients[:, :width]
    for _ in range(levels):
        detail = coefficients[:, width : 2 * width]
        rest = torch.stack([rest + detail, rest - detail], dim=2).flatten(1) * math.sqrt(0.5)
        width *= 2
    return rest


def check_levels(levels: int) -> None:
    """Refuse depths that make no sense.

    Raises:
        ValueError: for them.
    """
    if not 1 <= levels <= 20:
        raise ValueError(f"levels = {levels} is not in 1..20")
