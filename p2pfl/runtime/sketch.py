"""Short sketches of models, from which distances between models can be estimated.

Real peers do not hold each other's models, so the distance from the mean model is worked
out afterwards, from a few numbers that each peer noted down. A sketch is linear, so the
sketch of a difference is the difference of sketches.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

from p2pfl import rng
from p2pfl.learning.tree import wide

WIDTH = 256


def sketch(params: Tensor) -> Tensor:
    """Return ``[rows, d] -> [rows, WIDTH]`` whose squared norm is that of `params`, nearly.

    Signs are drawn at random (the same for everybody) and the entries summed in WIDTH
    groups (Charikar et al. 2002): unbiased, with a relative standard error of about
    ``sqrt(2 / WIDTH)`` = 9 %. Models with at most WIDTH parameters are kept as they are.
    """
    params = params.to(wide(params))
    rows, d = params.shape
    if d <= WIDTH:
        return torch.nn.functional.pad(params, (0, WIDTH - d))
    padded = torch.nn.functional.pad(params * _signs(d).to(params), (0, -d % WIDTH))
    return padded.reshape(rows, -1, WIDTH).sum(1)


def distances(sketches: Tensor) -> Tensor:
    """Return the squared distance of every row from the mean row, ``[rows, k] -> [rows]``.

    A row of NaN is unknown: it does not count in the mean.
    """
    known = ~sketches.isnan().any(1)
    return (sketches - sketches[known].mean(0)).square().sum(1)


@functools.lru_cache(maxsize=2)
def _signs(d: int) -> Tensor:
    lots = rng.uniform(rng.keys(0, torch.tensor([0])), d)[0]
    return torch.where(lots < 0.5, -1.0, 1.0)
