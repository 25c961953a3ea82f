"""How much a node takes of what it hears: weights both ends of a link can compute."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from p2pfl.topology.schedule import Links, in_degrees, out_degrees

DENSE_NODES = 64  # up to here a dense matrix is faster than a sparse one, whatever its filling
DENSE_SHARE = 4  # and beyond if more than one entry in so many is not zero


class Mixing(NamedTuple):
    """A weight per link, from the degrees of its two ends.

    Attributes:
        weight: what a receiver takes of a sender, given the receiver's in-degree and the
            sender's out-degree (neither counts the node itself).
        conserves: whose weights sum to one, and so what is left for a node's own value: those
            of a receiver (``"mean"``, row-stochastic) or of a sender (``"mass"``,
            column-stochastic).
        name: what reports call it.
        share: what is made of weights that come with the links (`Links.weights`) and go before
            those of the rule: they are multiplied by it.
    """

    weight: Callable[[int, int], float]
    conserves: Literal["mean", "mass"]
    name: str
    share: float = 1.0


def metropolis(lazy: bool = False) -> Mixing:
    """Return Metropolis-Hastings weights, ``1 / (1 + max(taking, giving))``.

    Symmetric and doubly stochastic on any undirected graph, with a positive own weight (Xiao,
    Boyd and Kim, 2007). On a directed graph they are doubly stochastic if all degrees are equal.

    Args:
        lazy: halve what is taken of others, so that W becomes (I + W) / 2 and has no negative
            eigenvalue.
    """
    share = 0.5 if lazy else 1.0
    name = "lazy metropolis" if lazy else "metropolis"
    return Mixing(lambda taking, giving: share / (1 + max(taking, giving)), "mean", name, share)


def uniform() -> Mixing:
    """Return equal weights for everything heard, ``1 / (1 + taking)``.

    Row-stochastic: on a graph that is not regular, consensus is not on the mean; node i counts
    in proportion to its degree plus one.
    """
    return Mixing(lambda taking, giving: 1 / (1 + taking), "mean", "uniform")


def push() -> Mixing:
    """Return equal shares for everybody sent to, ``1 / (1 + giving)``.

    Column-stochastic: sums are conserved on any directed graph, so that values and weights,
    mixed alike, have the mean as their quotient (push-sum: Kempe, Dobra and Gehrke, 2003).
    """
    return Mixing(lambda taking, giving: 1 / (1 + giving), "mass", "push")


MIXING: dict[str, Callable[..., Mixing]] = {
    "metropolis": metropolis,
    "uniform": uniform,
    "push": push,
}


def weights(links: Links, mixing: Mixing, dtype: torch.dtype = torch.float64) -> Tensor:
    """Return the mixing matrix ``[n, n]``: ``W[i, j]`` is what node i takes of node j.

    The diagonal is what is left, so that rows (or columns, if mass is conserved) sum to one.
    Dense up to 64 nodes or if more than a quarter full, else CSR with sorted columns and every
    diagonal entry present. If all hear all alike, it is one row, expanded.

    >>> from p2pfl.topology import chain_graph, static
    >>> weights(static(chain_graph(2)).links(0), metropolis())
    tensor([[0.5000, 0.5000],
            [0.5000, 0.5000]], dtype=torch.float64)
    """
    n = links.n
    # Where everybody hears everybody, all rows are equal.
    if links.weights is None and len(links.senders) == n * (n - 1):
        share = mixing.weight(n - 1, n - 1)
        if abs(n * share - 1) < 1e-12:
            return torch.full((1, n), 1 / n, dtype=dtype).expand(n, n)
    values = _link_weights(links, mixing)
    summed_by = links.receivers if mixing.conserves == "mean" else links.senders
    own = 1 - torch.zeros(n, dtype=torch.float64).index_add_(0, summed_by, values)
    nodes = torch.arange(n)
    rows = torch.cat([links.receivers, nodes])
    columns = torch.cat([links.senders, nodes])
    values = torch.cat([values, own]).to(dtype)
    if n <= DENSE_NODES or DENSE_SHARE * len(values) > n * n:
        matrix = torch.zeros(n, n, dtype=dtype)
        matrix[rows, columns] = values
        return matrix
    order = torch.argsort(rows * n + columns)
    return _csr(rows[order], columns[order], values[order], n)


def _link_weights(links: Links, mixing: Mixing) -> Tensor:
    """Return the weight of every link, ``[links]``, asking once for every pair of degrees."""
    if links.weights is not None:
        return mixing.share * links.weights
    taking = in_degrees(links)[links.receivers]
    giving = out_degrees(links)[links.senders]
    keys, place = torch.unique(taking * links.n + giving, return_inverse=True)
    pairs = [divmod(key, links.n) for key in keys.tolist()]  # no degree reaches n
    return torch.tensor([mixing.weight(*pair) for pair in pairs], dtype=torch.float64)[place]


def _csr(rows: Tensor, columns: Tensor, values: Tensor, n: int) -> Tensor:
    start = torch.cat(
        [torch.zeros(1, dtype=torch.int64), torch.bincount(rows, minlength=n).cumsum(0)]
    )
    with warnings.catch_warnings():  # torch calls its CSR layout a beta
        warnings.filterwarnings("ignore", message=".*[Ss]parse CSR.*")
        return torch.sparse_csr_tensor(start, columns, values, (n, n), check_invariants=False)
