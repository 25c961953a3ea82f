"""How fast a topology and its mixing weights bring everybody to agreement.

Notation: W(t) is the mixing matrix of round t, P = W(τ-1) ... W(0) their product over a period
of τ rounds (τ = 1 for a static graph), J = 11ᵀ/n, x̄ the mean. Weights which conserve mass are
judged by what they are used for, the quotient of mixed values and mixed ones (push-sum).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple, cast

import numpy as np
import torch
from torch import Tensor

from p2pfl.topology.iterate import (
    LIMIT,
    ZERO,
    Spectrum,
    march,
    power_spectrum,
    repeat,
    spread,
    transposed,
)
from p2pfl.topology.mixing import Mixing, weights
from p2pfl.topology.schedule import Topology, in_degrees, out_degrees

DENSE = 2000  # nodes up to which matrices are multiplied and decomposed
DIGITS = 13  # of a spectrum; what follows is noise


class Analysis(NamedTuple):
    """What is known of a topology and its mixing weights.

    Attributes:
        nodes: how many.
        edges: different pairs that ever talk; links instead of pairs if directed.
        directed: whether some link goes one way only.
        period: rounds after which the links repeat, None if they never do.
        degree_max: the largest in- or out-degree of any round.
        doubly_stochastic: whether rows and columns of every W(t) sum to one.
        rho: ‖P - J‖₂, what is left at worst of a disagreement after a *period*.
        slem: the second largest modulus among the eigenvalues of P.
        gap: 1 - rho.
        lambda_min: the smallest eigenvalue of a static symmetric W to 13 digits, else None.
        exact_after: rounds after which the product equals J to 1e-12 at one stroke (a schedule
            with a finite end), None if it is only approached.
        rounds_to_1e_6: rounds in which ‖x - x̄‖ shrinks to 1e-6 of itself from x_i = i; None if
            it takes more than a million (100 000 if approximate) or never happens.
        approximate: with more than 2000 nodes the spectrum is from power iterations, bounds
            that are the closer the larger the gap, and many rounds are extrapolated.

    `rho`, `slem` and `gap` are None for a topology without a period.
    """

    nodes: int
    edges: int
    directed: bool
    period: int | None
    degree_max: int
    doubly_stochastic: bool
    rho: float | None
    slem: float | None
    gap: float | None
    lambda_min: float | None
    exact_after: int | None
    rounds_to_1e_6: int | None
    approximate: bool


def analyse(topology: Topology, mixing: Mixing) -> Analysis:
    """Return the numbers that say how well a topology mixes.

    >>> from p2pfl.topology import metropolis, star_graph, static
    >>> analyse(static(star_graph(16)), metropolis()).rho
    0.9375
    """
    n, period = topology.n, topology.period
    matrices = [weights(links, mixing) for links in topology.rounds()]
    ramp = torch.arange(n, dtype=torch.float64)[:, None]
    if period is None:
        spectrum = Spectrum(None, None, None)
        rounds = march(_endless(topology, mixing), ramp, 1e-6)
    elif n > DENSE:
        spectrum = power_spectrum(matrices)
        rounds = march(repeat(matrices), ramp, 1e-6)
    else:
        spectrum = _spectrum(_product(matrices), static=period == 1)
        start = torch.cat([ramp, torch.ones_like(ramp)], 1)
        goal = 1e-6 * spread(start)
        rounds = _first(matrices, start, lambda block: spread(block) <= goal)
    return Analysis(
        nodes=n,
        edges=_edges(topology),
        directed=not topology.is_symmetric,
        period=period,
        degree_max=_degree_max(topology),
        doubly_stochastic=all(is_doubly_stochastic(matrix) for matrix in matrices),
        rho=spectrum.rho,
        slem=spectrum.slem,
        gap=None if spectrum.rho is None else round(1 - spectrum.rho, DIGITS),
        lambda_min=spectrum.lambda_min,
        exact_after=None if n > DENSE else _exact_after(topology, mixing),
        rounds_to_1e_6=rounds,
        approximate=n > DENSE,
    )


def rounds_to(topology: Topology, mixing: Mixing, tolerance: float) -> int:
    """Return the rounds after which any disagreement has shrunk to `tolerance` of itself.

    Counted from round 0, in the 2-norm, and exact up to 2000 nodes if the links repeat.
    Otherwise it is what happens to a few random vectors, judged 2√n times as strictly because
    the slowest mode is but a small part of those.

    Raises:
        ValueError: `tolerance` is not between 0 and 1, or it takes more than a million rounds
            (100 000 where they are not exact).
    """
    if not 0 < tolerance < 1:
        raise ValueError(f"tolerance = {tolerance} must be above 0 and below 1")
    if topology.n == 1:
        return 0
    if topology.period is None or topology.n > DENSE:
        start = torch.from_numpy(np.random.default_rng(0).standard_normal((topology.n, 4)))
        strict = tolerance / (2 * math.sqrt(topology.n))
        rounds = march(_endless(topology, mixing), start, strict)
    else:
        rounds = _rounds_dense([weights(links, mixing) for links in topology.rounds()], tolerance)
    if rounds is None:
        name = topology.name or "the topology"
        raise ValueError(f"{name} with {mixing.name} never agrees, or too slowly")
    return rounds


def _rounds_dense(matrices: list[Tensor], tolerance: float) -> int | None:
    product = _product(matrices)
    if len(matrices) == 1 and torch.allclose(product, product.T, rtol=0, atol=ZERO):
        rho = cast(float, _spectrum(product, static=True).rho)
        if rho >= 1 - ZERO:
            return None
        rounds = 1 if rho <= tolerance else math.ceil(math.log(tolerance) / math.log(rho) - 1e-9)
        return rounds if rounds <= LIMIT else None
    return _first(
        matrices,
        torch.eye(len(product), dtype=torch.float64),
        lambda block: float(torch.linalg.matrix_norm(_centred(block), 2)) <= tolerance,
    )


def _product(matrices: list[Tensor]) -> Tensor:
    product = torch.eye(matrices[0].shape[0], dtype=torch.float64)
    for matrix in matrices:
        product = matrix @ product
    return product


def _spectrum(product: Tensor, static: bool) -> Spectrum:
    n = len(product)
    if n == 1:
        return Spectrum(0.0, 0.0, None)
    if torch.allclose(product, product.T, rtol=0, atol=ZERO):
        values = torch.linalg.eigvalsh(product)  # ascending; the last is 1
        rho = _tidy(values[:-1].abs().max())
        return Spectrum(rho, rho, _tidy(values[0]) if static else None)
    rho = _tidy(torch.linalg.matrix_norm(product - 1 / n, 2))
    slem = _tidy(torch.linalg.eigvals(product).abs().sort().values[-2])
    return Spectrum(rho, slem, None)


def _tidy(value: Tensor) -> float:
    """Return a number without the noise of its last digits, so that nothing is zero."""
    return round(float(value), DIGITS) + 0.0


def _first(
    matrices: list[Tensor], start: Tensor, done: Callable[[Tensor], bool], limit: int = LIMIT
) -> int | None:
    """Return the fewest rounds after which the mixed block is done (and remains so), or None.

    By repeated squaring of the product over a period, so that slow graphs take no longer.
    """
    if done(start):
        return 0
    powers = [_product(matrices)]  # entry k covers 2^k periods
    while not done(powers[-1] @ start):
        if len(matrices) << len(powers) - 1 > limit:
            return None
        powers.append(powers[-1] @ powers[-1])
    block, rounds = start, 0
    for k in reversed(range(len(powers) - 1)):
        further = powers[k] @ block
        if not done(further):
            block, rounds = further, rounds + (len(matrices) << k)
    for matrix in matrices:
        block, rounds = matrix @ block, rounds + 1
        if done(block):
            break
    return rounds if rounds <= limit else None


def _exact_after(topology: Topology, mixing: Mixing) -> int | None:
    """Return after how many rounds the product is J, if it becomes so at one stroke."""
    n = topology.n
    product = torch.eye(n, dtype=torch.float64)
    error = float((product - 1 / n).abs().max())
    limit = 2 * max(topology.period or 1, n.bit_length())
    for round in range(limit + 1):
        if error <= ZERO:
            return round
        product = weights(topology.links(round), mixing) @ product
        before, error = error, float((product - 1 / n).abs().max())
        if before < 1000 * ZERO:
            return None  # it got this close step by step
    return None


def _centred(block: Tensor) -> Tensor:
    """Return the rows as everybody's estimates, without what all of them agree on."""
    estimates = block / block.sum(1, keepdim=True)
    return estimates - estimates.mean(0)


def _endless(topology: Topology, mixing: Mixing) -> Iterator[Tensor]:
    if topology.period is not None:
        yield from repeat([weights(links, mixing) for links in topology.rounds()])
    for round in range(LIMIT):
        yield weights(topology.links(round), mixing)


def is_doubly_stochastic(matrix: Tensor) -> bool:
    """Say whether the rows and the columns of a matrix, dense or CSR, sum to one."""
    ones = torch.ones(matrix.shape[0], 1, dtype=matrix.dtype)
    sums = torch.cat([matrix @ ones, transposed(matrix) @ ones])
    return bool(((sums - 1).abs() < 1e-9).all())


def _edges(topology: Topology) -> int:
    n = topology.n
    keys = torch.cat([links.receivers * n + links.senders for links in topology.rounds()])
    links = len(torch.unique(keys))
    return links // 2 if topology.is_symmetric else links


def _degree_max(topology: Topology) -> int:
    return max(
        int(torch.maximum(in_degrees(links), out_degrees(links)).max())
        for links in topology.rounds()
    )
