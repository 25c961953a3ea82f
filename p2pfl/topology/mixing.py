"""How much a node takes of what it hears: weights that both ends of a link can compute."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from p2pfl.topology.optimal import best_constant_weights, cvxpy, fastest_weights
from p2pfl.topology.schedule import Links, Topology, in_degrees, out_degrees

DENSE_NODES = 64  # up to here a dense matrix is faster than a sparse one, whatever its filling
DENSE_SHARE = 4  # and beyond if more than one entry in so many is not zero


class Mixing(NamedTuple):
    """A weight per link, from the degrees of its two ends or from the whole graph.

    Attributes:
        weight: what a receiver takes of a sender, given the receiver's in-degree and the
            sender's out-degree (neither counts the node itself).
        conserves: whose weights sum to one, and so what is left for a node's own value: those
            of a receiver (``"mean"``, row-stochastic) or of a sender (``"mass"``,
            column-stochastic).
        name: what reports call it.
        share: what is made of weights that come with the links (`Links.weights`) and go before
            those of the rule: they are multiplied by it.
        of_graph: where two degrees do not say it: given the links of a round the weight of each,
            ``[links]`` float64. It goes by the links alone, so that every peer works out the
            same. `weight` is asked only for who is heard late, and no neighbour any more.
    """

    weight: Callable[[int, int], float]
    conserves: Literal["mean", "mass"]
    name: str
    share: float = 1.0
    of_graph: Callable[[Links], Tensor] | None = None


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


def max_degree(lazy: bool = False) -> Mixing:
    """Return the same weight for every link, ``1 / (1 + the largest degree of all)``.

    Symmetric and doubly stochastic on any undirected graph, and on directed ones whose nodes
    send to as many as they hear. The simplest of the constant weights, slower than `metropolis`
    where degrees differ.

    Args:
        lazy: halve it, so that W becomes (I + W) / 2 and has no negative eigenvalue.
    """
    share = 0.5 if lazy else 1.0

    def of_graph(links: Links) -> Tensor:
        largest = torch.cat([in_degrees(links), out_degrees(links)]).max()
        return (share / (1 + largest.double())).expand(links.senders.shape)

    return _of_graph(of_graph, "lazy max_degree" if lazy else "max_degree")


def best_constant() -> Mixing:
    """Return the one weight for all links that agrees fastest (Xiao and Boyd, 2004).

    ``2 / (largest + smallest eigenvalue of the Laplacian that is not 0)``: as fast as `fastest` on
    graphs whose links are all alike (ring, torus, hypercube, star). For undirected graphs of up to
    2000 nodes. What a node keeps of its own may be negative, as in the centre of a star.
    """
    return _of_graph(best_constant_weights, "best_constant")


def fastest(nonnegative: bool = False) -> Mixing:
    """Return the symmetric weights with which the slowest disagreement decays fastest.

    A semidefinite program, solved by cvxpy with Clarabel (``pip install
    'p2pfl-gossip[optimal]'``): FDLA of Xiao and Boyd (2004). For undirected graphs of up to 64
    nodes. Peers solve it each for itself; with the same versions of both on machines alike they
    find the same, to 9 decimals, and else the same to the solver's accuracy.

    Args:
        nonnegative: ask for weights that are not negative, own ones included: the fastest mixing
            Markov chain of Boyd, Diaconis and Xiao (2004).
    """
    cvxpy()
    name = "nonnegative fastest" if nonnegative else "fastest"
    return _of_graph(lambda links: fastest_weights(links, nonnegative), name)


MIXING: dict[str, Callable[..., Mixing]] = {
    "best_constant": best_constant,
    "fastest": fastest,
    "max_degree": max_degree,
    "metropolis": metropolis,
    "uniform": uniform,
    "push": push,
}


def in_shares(mixing: Mixing) -> Mixing:
    """Return the same weights of links for who splits a mass, as push-sum does.

    What is left for oneself then makes the *columns* sum to one. Of a symmetric rule these are the
    same matrices; a sender needs the degrees of those it sends to, so it goes by the whole graph.
    Nobody gives away less than nothing, or more than it has: where the rule asks for that, as it
    may on the graph that is left of a larger one, shares are cut down.
    """

    def of_graph(links: Links) -> Tensor:
        values = link_weights(links, mixing).clamp(min=0)
        given = torch.zeros(links.n, dtype=torch.float64).index_add_(0, links.senders, values)
        return values / given.clamp(min=1)[links.senders]

    return mixing._replace(conserves="mass", of_graph=of_graph)


def _of_graph(of_graph: Callable[[Links], Tensor], name: str) -> Mixing:
    return Mixing(metropolis().weight, "mean", name, of_graph=of_graph)


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
    values = prescribed(links, mixing)
    if len(links.senders) == n * (n - 1):  # everybody hears everybody
        share = mixing.weight(n - 1, n - 1)
        each = torch.tensor(share, dtype=torch.float64) if values is None else values
        if bool(((n * each - 1).abs() < 1e-11).all()):  # all rows are equal
            return torch.full((1, n), 1 / n, dtype=dtype).expand(n, n)
    values = _by_degrees(links, mixing) if values is None else values
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
    return csr(rows[order], columns[order], values[order], (n, n))


def prescribed(links: Links, mixing: Mixing) -> Tensor | None:
    """Return the weight of every link, ``[links]``, or None: it follows from two degrees."""
    if links.weights is not None:
        return mixing.share * links.weights
    return None if mixing.of_graph is None else mixing.of_graph(links)


def weighted(topology: Topology, mixing: Mixing) -> Topology:
    """Return a topology whose links bear their weights, where those go by more than two degrees."""
    if mixing.of_graph is None and mixing.share == 1:
        return topology  # weights that its links come with are right as they are
    period = topology.period

    @lru_cache(maxsize=period or 4)
    def links(round: int) -> Links:
        plain = topology.links(round)
        return plain._replace(weights=prescribed(plain, mixing))

    by_round = (lambda round: links(round % period)) if period else links
    return replace(topology, links=by_round)


def link_weights(links: Links, mixing: Mixing) -> Tensor:
    """Return what the receiver of every link takes of its sender, ``[links]`` float64."""
    values = prescribed(links, mixing)
    return _by_degrees(links, mixing) if values is None else values


def _by_degrees(links: Links, mixing: Mixing) -> Tensor:
    """Return the weight of every link, asking once for every pair of degrees."""
    taking = in_degrees(links)[links.receivers]
    giving = out_degrees(links)[links.senders]
    keys, place = torch.unique(taking * links.n + giving, return_inverse=True)
    pairs = [divmod(key, links.n) for key in keys.tolist()]  # no degree reaches n
    return torch.tensor([mixing.weight(*pair) for pair in pairs], dtype=torch.float64)[place]


def csr(rows: Tensor, columns: Tensor, values: Tensor, shape: tuple[int, int]) -> Tensor:
    """Return the sparse matrix of some entries, which are sorted by rows and then columns."""
    count = torch.bincount(rows, minlength=shape[0])
    start = torch.cat([count.new_zeros(1), count.cumsum(0)])
    with warnings.catch_warnings():  # torch calls its CSR layout a beta
        warnings.filterwarnings("ignore", message=".*[Ss]parse CSR.*")
        return torch.sparse_csr_tensor(start, columns, values, shape, check_invariants=False)
