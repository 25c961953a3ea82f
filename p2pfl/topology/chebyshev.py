"""Faster agreement from the same messages: what a round has made is mixed with the one before.

After t rounds x is then not ``W^t x`` but the polynomial of degree t in W that is smallest where
the other eigenvalues lie, between -rho and rho (Arioli and Scott 2014, *Chebyshev acceleration of
iterative refinement*).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import repeat

from torch import Tensor


def coefficients(rho: float) -> Iterator[tuple[float, float]]:
    """Yield (a, b) of round 1, 2, ...: ``x_t = a W x_(t-1) - b x_(t-2)``, and ``a - b = 1``.

    They tend to ``2 / (1 + sqrt(1 - rho^2))`` and that less one.

    Args:
        rho: bounds the moduli of all eigenvalues of W but the one of 1. Too high is slower, too
            low may diverge.

    Raises:
        ValueError: `rho` is not above 0 and below 1.
    """
    if not 0 < rho < 1:
        raise ValueError(f"rho = {rho} must be above 0 and below 1")
    yield 1.0, 0.0
    ratio = rho  # T_(t-1) / T_t at 1 / rho, of Chebyshev polynomials, which themselves overflow
    while True:
        before, ratio = ratio, 1 / (2 / rho - ratio)
        yield 2 / rho * ratio, before * ratio


def accelerated(matrix: Tensor, x: Tensor, rho: float, rounds: int) -> Iterator[Tensor]:
    """Yield what becomes of x ``[n, d]`` after 1, 2, ... rounds.

    Args:
        matrix: the mixing matrix W ``[n, n]``, dense or CSR: symmetric, its rows sum to one.
        x: the values at the outset.
        rho: ‖W - J‖₂, or more; see `coefficients`.
        rounds: how many.

    Raises:
        ValueError: `rho` is not above 0 and below 1.
    """
    before = x
    for (a, b), _ in zip(coefficients(rho), repeat(None, rounds), strict=False):
        before, x = x, a * (matrix @ x) - b * before
        yield x


def bound(rho: float, rounds: int) -> float:
    """Return how much is left of any disagreement at most, ``1 / T_rounds(1 / rho)``."""
    return 1 / math.cosh(rounds * math.acosh(1 / rho))
