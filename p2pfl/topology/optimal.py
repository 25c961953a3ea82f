"""Weights that suit a whole graph: the best one for all links, and the best for each.

They follow from the links of a round alone, so peers that agree on those agree on the weights,
and every link has one number for both its ends. Numbers are rounded, so that the last bits, in
which the linear algebra of one machine may differ from another's, do not show.
"""

from __future__ import annotations

import warnings
from functools import lru_cache
from types import ModuleType

import networkx as nx
import numpy as np
import torch
from torch import Tensor

from p2pfl.topology.schedule import Links

SPECTRAL = 2000  # nodes up to which eigenvalues are worked out
SOLVED = 64  # nodes up to which weights are optimised, which takes 4 s (for 32: 0.3 s)
REMEMBERED = 64  # graphs whose weights are kept at hand
ZERO = 1e-9  # no connected graph of so few nodes has a smaller eigenvalue, but for the one of 0
DIGITS = 12  # of a constant weight
DECIMALS = 9  # of an optimised one
TOLERANCE = 1e-9  # of the solver
MARGIN = 1e-7  # kept at least for oneself where nothing may be negative; more than is rounded off


def best_constant_weights(links: Links) -> Tensor:
    """Return the one weight for all links with which I - weight * Laplacian contracts most.

    It is ``2 / (largest + smallest eigenvalue of the Laplacian)``, the zeros left out (Xiao and
    Boyd 2004, *Fast linear iterations for distributed averaging*). ``[links]``

    Raises:
        ValueError: some link goes one way only, or there are more than 2000 nodes.
    """
    ends, place = _edges(links)
    if links.n > SPECTRAL:
        raise ValueError(f"best_constant is for up to {SPECTRAL} nodes, not {links.n}")
    weight = _best_step(links.n, ends.numpy().tobytes()) if len(ends) else 0.0
    return torch.full(place.shape, weight, dtype=torch.float64)


def fastest_weights(links: Links, nonnegative: bool) -> Tensor:
    """Return the symmetric weights that contract most in a round at worst, ``[links]``.

    They minimise the largest of all ``‖W - J‖₂`` over the connected parts, a semidefinite program
    (FDLA, Xiao and Boyd 2004); with `nonnegative` among matrices without negative entries (FMMC,
    Boyd, Diaconis and Xiao 2004).

    Raises:
        ValueError: some link goes one way only, more than 64 nodes have links, or the solver gives
            up.
    """
    ends, place = _edges(links)
    nodes, ends = torch.unique(ends, return_inverse=True)
    if len(nodes) > SOLVED:
        raise ValueError(f"fastest is for up to {SOLVED} nodes, not {len(nodes)}")
    edges = tuple((low, high) for low, high in ends.tolist())
    return torch.tensor(_solved(edges, nonnegative), dtype=torch.float64)[place]


def cvxpy() -> ModuleType:
    """Return cvxpy.

    Raises:
        ValueError: it is not installed.
    """
    try:
        import cvxpy as found
    except ImportError:
        raise ValueError("fastest needs cvxpy: pip install 'p2pfl-gossip[optimal]'") from None
    return found


def _edges(links: Links) -> tuple[Tensor, Tensor]:
    """Return the edges ``[m, 2]`` in order, and of which each link is part, ``[links]``."""
    low = torch.minimum(links.senders, links.receivers)
    high = torch.maximum(links.senders, links.receivers)
    keys, place, count = torch.unique(low * links.n + high, return_inverse=True, return_counts=True)
    if bool((count != 2).any()):
        raise ValueError("weights for a whole graph ask for links that go both ways")
    return torch.stack([keys // links.n, keys % links.n], 1), place


@lru_cache(REMEMBERED)
def _best_step(n: int, ends: bytes) -> float:
    low, high = np.frombuffer(ends, dtype=np.int64).reshape(-1, 2).T
    laplacian = np.zeros((n, n))
    laplacian[low, high] = laplacian[high, low] = -1
    np.fill_diagonal(laplacian, -laplacian.sum(1))
    values = np.linalg.eigvalsh(laplacian)  # ascending; a zero for every connected part
    step = 2 / (values[-1] + values[values > ZERO][0])
    return float(f"{step:.{DIGITS}g}")


@lru_cache(REMEMBERED)
def _solved(edges: tuple[tuple[int, int], ...], nonnegative: bool) -> tuple[float, ...]:
    """Return the best weight of every edge; the nodes are ``0 .. n-1``, and each has one."""
    cp = cvxpy()
    if not edges:
        return ()
    n = 1 + max(max(edge) for edge in edges)
    incidence, parts = np.zeros((n, len(edges))), np.zeros((n, n))
    for k, (low, high) in enumerate(edges):
        incidence[low, k], incidence[high, k] = 1, -1
    for part in nx.connected_components(nx.Graph(edges)):
        parts[np.ix_(list(part), list(part))] = 1 / len(part)
    weights, left = cp.Variable(len(edges)), cp.Variable()
    off = np.eye(n) - parts - incidence @ cp.diag(weights) @ incidence.T
    limits = [left * np.eye(n) - off >> 0, left * np.eye(n) + off >> 0]
    if nonnegative:
        limits += [weights >= 0, np.abs(incidence) @ weights <= 1 - MARGIN]
    problem = cp.Problem(cp.Minimize(left), limits)
    accuracy = dict.fromkeys(("tol_gap_abs", "tol_gap_rel", "tol_feas"), TOLERANCE)
    with warnings.catch_warnings():  # of an accuracy below what was asked for, which does
        warnings.simplefilter("ignore")
        problem.solve(solver=cp.CLARABEL, **accuracy)
    if problem.status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
        raise ValueError(f"fastest has no solution for this graph: {problem.status}")
    found = np.maximum(weights.value, 0) if nonnegative else weights.value
    return tuple((np.round(found, DECIMALS) + 0.0).tolist())
