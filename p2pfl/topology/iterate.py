"""Numbers about large matrices, found by multiplying vectors with them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

LIMIT = 1_000_000  # rounds beyond which agreement does not count as reached
PATIENCE = 5000  # rounds which are run before the rest is extrapolated
EXTRAPOLATED = 20 * PATIENCE  # rounds beyond which that tells nothing
POWERS = 2000  # steps of a power iteration
ZERO = 1e-12


class Spectrum(NamedTuple):
    """What the eigenvalues and singular values of a product of mixing matrices say."""

    rho: float | None
    slem: float | None
    lambda_min: float | None


def spread(block: Tensor) -> float:
    """Return ‖x - x̄‖ of the quotients of all columns by the last, which began as ones."""
    values = block[:, :-1] / block[:, -1:]
    return float((values - values.mean(0)).norm(dim=0).max())


def repeat(matrices: list[Tensor]) -> Iterator[Tensor]:
    """Yield the matrices over and over."""
    while True:
        yield from matrices


def march(matrices: Iterator[Tensor], start: Tensor, tolerance: float) -> int | None:
    """Return the rounds in which ‖x - x̄‖ shrinks by `tolerance`, run one by one.

    After 5000 rounds the rest is extrapolated from the second half of them, up to 100 000; None
    is what takes longer or never happens.
    """
    block = torch.cat([start, torch.ones(len(start), 1, dtype=torch.float64)], 1)
    first = halfway = now = spread(block)
    for rounds in range(PATIENCE + 1):
        if now <= tolerance * first:
            return rounds
        if rounds == PATIENCE // 2:
            halfway = now
        if rounds < PATIENCE:
            block = next(matrices) @ block
            now = spread(block)
    if now >= halfway:
        return None
    rate = math.log(halfway / now) / (PATIENCE - PATIENCE // 2)
    rounds = PATIENCE + math.ceil(math.log(now / (tolerance * first)) / rate)
    return rounds if rounds <= EXTRAPOLATED else None


def power_spectrum(matrices: list[Tensor]) -> Spectrum:
    """Return lower bounds of rho and slem, an upper one of lambda_min, by power iteration."""
    n = matrices[0].shape[0]
    turned = [transposed(matrix) for matrix in matrices]

    def forth(x: Tensor) -> Tensor:
        for matrix in matrices:
            x = matrix @ x
        return x

    def back(x: Tensor) -> Tensor:
        for matrix in reversed(turned):
            x = matrix @ x
        return x

    # (P - J)ᵀ (P - J), whose largest eigenvalue is rho²
    rho = math.sqrt(_growth(lambda x: back(y := forth(x) - x.mean(0)) - y.mean(0), n))
    symmetric = len(matrices) == 1 and _is_symmetric(matrices[0], turned[0])
    if symmetric:
        return Spectrum(rho, rho, 1 - _growth(lambda x: x - forth(x), n))
    return Spectrum(rho, _growth(lambda x: forth(x - x.mean(0)), n), None)


def _growth(apply: Callable[[Tensor], Tensor], n: int) -> float:
    """Return by how much `apply` stretches what it stretches most, over its last half."""
    x = torch.from_numpy(np.random.default_rng(0).standard_normal((n, 1)))
    x = x - x.mean(0)
    grown = 0.0
    for step in range(POWERS):
        x = apply(x / x.norm())
        norm = float(x.norm())
        if norm < ZERO:
            return 0.0
        grown += math.log(norm) if step >= POWERS // 2 else 0.0
    return math.exp(grown / (POWERS - POWERS // 2))


def transposed(matrix: Tensor) -> Tensor:
    """Return the transpose in the layout of the matrix, dense or CSR."""
    return matrix.T if matrix.layout is torch.strided else matrix.t().to_sparse_csr()


def _is_symmetric(matrix: Tensor, turned: Tensor) -> bool:
    if matrix.layout is torch.strided:
        return torch.equal(matrix, turned)
    return torch.equal(matrix.col_indices(), turned.col_indices()) and torch.equal(
        matrix.values(), turned.values()
    )
