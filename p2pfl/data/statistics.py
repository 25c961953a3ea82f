"""Means and standard deviations of features, in a form that peers can average.

Each peer describes its rows by count, sum and sum of squares per feature. These add up, so
their mean over the peers, which gossip computes, standardises every peer's data by the
statistics of all rows without anybody showing a row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from p2pfl.data.shards import Shards

# Where the variance is this small beside the mean square, it is rounding: float32 data
# resolve 1e-7 of the mean, and a constant column must not be blown up.
_CONSTANT = 1e-12


class Affine(NamedTuple):
    """A shift and a scale per feature."""

    shift: Tensor  # [..., f]
    scale: Tensor  # [..., f]

    def apply(self, x: Tensor) -> Tensor:
        """Return ``(x - shift) * scale`` with 0 (the mean) for what is missing."""
        return ((x - self.shift) * self.scale).nan_to_num(nan=0.0)


def moments(x: Tensor, numeric: Tensor) -> Tensor:
    """Return count, sum and sum of squares of each feature, ``[N, f] -> [3, f]`` float64.

    A missing value (NaN) counts nowhere. Features that are not `numeric` (bool ``[f]``)
    are zeros: nobody needs to hear of them. Sums are in double precision, which keeps a
    standard deviation of one millionth of the mean to three digits.
    """
    there = ~x.isnan() & numeric
    values = torch.where(there, x, 0.0).double()
    return torch.stack([there.sum(0).double(), values.sum(0), values.square().sum(0)])


def moments_by_node(shards: Shards, numeric: Tensor) -> Tensor:
    """Return the moments of each node of the shards, ``[m, 3, f]`` float64.

    Node by node, so that a peer with its rows alone gets the same numbers to the last bit.
    """
    return torch.stack([moments(shards.rows_of(k).x, numeric) for k in shards.nodes.tolist()])


def standardise(moments: Tensor, numeric: Tensor, dtype: torch.dtype = torch.float32) -> Affine:
    """Return what brings features to mean 0 and variance 1, ``[..., 3, f] -> [..., f]``.

    Moments may be sums over peers or means over peers: only their ratios matter. A
    feature that is not `numeric`, was never seen or does not vary keeps its scale.

    >>> x = torch.tensor([[1.0, 1.0], [3.0, 0.0], [torch.nan, 1.0]])
    >>> numeric = torch.tensor([True, False])
    >>> standardise(moments(x, numeric), numeric).apply(x).tolist()
    [[-1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    """
    count, total, squares = moments.double().unbind(-2)
    seen = (count > 0) & numeric
    safe = torch.where(seen, count, 1.0)
    mean = torch.where(seen, total / safe, 0.0)
    square = torch.where(seen, squares / safe, 0.0)
    variance = square - mean.square()
    varies = seen & (variance > _CONSTANT * square)
    scale = torch.where(varies, variance, 1.0).rsqrt()
    return Affine(mean.to(dtype), scale.to(dtype))
