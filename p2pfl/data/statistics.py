"""Means and standard deviations of features, in a form that peers can average.

Each peer describes its rows by count, sum and sum of squares per feature. These add up, so
their mean over the peers, which gossip computes, standardises every peer's data by the
statistics of all rows without anybody showing a row. It takes two passes, the second around
the mean that the first has found: a spread far below the mean would otherwise be lost.
"""

from __future__ import annotations

from collections.abc import Callable
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


def moments(x: Tensor, numeric: Tensor, around: Tensor | float = 0.0) -> Tensor:
    """Return count, sum and sum of squares of each feature, ``[N, f] -> [3, f]`` float64.

    What is summed is the distance from `around` (``[f]``). A missing value (NaN) counts
    nowhere. Features that are not `numeric` (bool ``[f]``) are zeros: nobody needs to hear
    of them.
    """
    there = ~x.isnan() & numeric
    values = torch.where(there, x.double() - around, 0.0)
    return torch.stack([there.sum(0).double(), values.sum(0), values.square().sum(0)])


def moments_by_node(shards: Shards, numeric: Tensor, around: Tensor | None = None) -> Tensor:
    """Return the moments of each node around its own line of `around`, ``[m, 3, f]`` float64.

    Node by node, so that a peer with its rows alone gets the same numbers to the last bit.
    """
    nodes = shards.nodes.tolist()
    centres = [0.0] * len(nodes) if around is None else around
    each = zip(nodes, centres, strict=True)
    return torch.stack([moments(shards.rows_of(k).x, numeric, centre) for k, centre in each])


def means(moments: Tensor) -> Tensor:
    """Return sums by counts, 0 for what was never seen: ``[..., 2 or 3, f] -> [..., f]``."""
    count, total = moments[..., 0, :], moments[..., 1, :]
    return torch.where(count > 0, total / torch.where(count > 0, count, 1.0), 0.0)


def in_two_passes(
    shards: Shards, numeric: Tensor, average: Callable[[Tensor], Tensor], dtype: torch.dtype
) -> Affine:
    """Return what standardises the data of each node, ``[m, f]``.

    Args:
        shards: their data.
        numeric: which features, bool ``[f]``.
        average: what each node makes of ``[m, k, f]`` of all, up to a factor; called twice.
        dtype: of the result.
    """
    around = means(average(moments_by_node(shards, numeric)[:, :2]))
    moments = average(moments_by_node(shards, numeric, around))
    return standardise(moments, numeric, dtype, around)


def standardise(
    moments: Tensor,
    numeric: Tensor,
    dtype: torch.dtype = torch.float32,
    around: Tensor | float = 0.0,
) -> Affine:
    """Return what brings features to mean 0 and variance 1, ``[..., 3, f] -> [..., f]``.

    Moments may be sums over peers or means over peers: only their ratios matter. `around`
    is what they were taken around: near the mean they are the most precise. A feature that
    is not `numeric`, was never seen or does not vary keeps its scale.

    >>> x = torch.tensor([[1.0, 1.0], [3.0, 0.0], [torch.nan, 1.0]])
    >>> numeric = torch.tensor([True, False])
    >>> standardise(moments(x, numeric), numeric).apply(x).tolist()
    [[-1.0, 1.0], [1.0, 0.0], [0.0, 1.0]]
    """
    count, _, squares = moments.double().unbind(-2)
    seen = (count > 0) & numeric
    off = torch.where(seen, means(moments.double()), 0.0)
    mean = torch.where(seen, around + off, 0.0)
    square = torch.where(seen, squares / torch.where(seen, count, 1.0), 0.0)
    variance = square - off.square()
    varies = seen & (variance > _CONSTANT * (variance + mean.square()))
    scale = torch.where(varies, variance, 1.0).rsqrt()
    return Affine(mean.to(dtype), scale.to(dtype))
