"""Short sketches of models, from which distances between models can be estimated.

Real peers do not hold each other's models, so the distance from the mean model is worked
out afterwards, from a few numbers that each peer noted down. A sketch is linear, so the
sketch of a difference is the difference of sketches.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor
from torch.nn.functional import pad

from p2pfl import rng
from p2pfl.learning.tree import wide

WIDTH = 256
BLOCK = 1 << 18  # columns whose signs are drawn together, a multiple of WIDTH; they fit the cache


def sketch(params: Tensor) -> Tensor:
    """Return ``[rows, d] -> [rows, WIDTH]`` whose squared norm is that of `params`, nearly.

    Signs are drawn at random (the same for everybody) and the entries summed in WIDTH
    groups (Charikar et al. 2002): unbiased, with a relative standard error of about
    ``sqrt(2 / WIDTH)`` = 9 %. Models with at most WIDTH parameters are kept as they are.
    It takes a block of memory, and a byte for each parameter that is kept for the next one.
    """
    exact = wide(params)
    rows, d = params.shape
    if d <= WIDTH:
        return pad(params.to(exact), (0, WIDTH - d))
    total = torch.zeros(rows, WIDTH, dtype=exact, device=params.device)
    parts = zip(torch.split(params, BLOCK, 1), torch.split(_signs(d), BLOCK), strict=True)
    for block, signs in parts:
        signed = block.to(exact) * signs.to(params.device)
        total += pad(signed, (0, -signed.shape[1] % WIDTH)).view(rows, -1, WIDTH).sum(1)
    return total


def distances(sketches: Tensor) -> Tensor:
    """Return the squared distance of every row from the mean row, ``[rows, k] -> [rows]``.

    A row of NaN is unknown: it does not count in the mean.
    """
    known = ~sketches.isnan().any(1)
    return (sketches - sketches[known].mean(0)).square().sum(1)


@functools.lru_cache(maxsize=2)
def _signs(d: int) -> Tensor:
    signs = torch.empty(d, dtype=torch.int8)
    for k, block in enumerate(torch.split(signs, BLOCK)):
        block.copy_(rng.signs(rng.keys(0, torch.tensor([k])), len(block))[0])
    return signs
