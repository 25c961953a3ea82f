"""Graphs on n nodes, drawn by a rule: ``noun_graph(n, ...)``, nodes ``0 .. n-1``.

Everything here is connected, and an argument that cannot be met is a `ValueError` that names
the argument, its value and what would do. Undirected graphs are `networkx.Graph`, directed
ones `networkx.DiGraph` with an edge from the sender to the receiver.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable

import networkx as nx

TRIES = 100  # how often a random graph is drawn before it counts as hopeless
PLAIN_GNP = 1000  # above this many nodes the n² coin flips of G(n, p) take too long


def complete_graph(n: int) -> nx.Graph:
    """Return the graph in which everybody hears everybody.

    >>> complete_graph(4).number_of_edges()
    6
    """
    _at_least("n", n, 1)
    return nx.complete_graph(n)


def ring_graph(n: int) -> nx.Graph:
    """Return the cycle on n nodes (two nodes are a single edge).

    >>> sorted(ring_graph(5)[0])
    [1, 4]
    """
    _at_least("n", n, 2)
    return nx.cycle_graph(n)


def chain_graph(n: int) -> nx.Graph:
    """Return the path ``0 - 1 - ... - n-1``."""
    _at_least("n", n, 1)
    return nx.path_graph(n)


def star_graph(n: int) -> nx.Graph:
    """Return the star whose hub is node 0."""
    _at_least("n", n, 2)
    return nx.star_graph(n - 1)


def binary_tree_graph(n: int) -> nx.Graph:
    """Return the balanced binary tree: below node i hang ``2 i + 1`` and ``2 i + 2``.

    >>> sorted(binary_tree_graph(7)[1])
    [0, 3, 4]
    """
    _at_least("n", n, 1)
    return _graph(n, ((i, (i - 1) // 2) for i in range(1, n)))


def grid_graph(n: int, rows: int | None = None, cols: int | None = None) -> nx.Graph:
    """Return a grid, node ``r * cols + c`` in row r and column c.

    Without `rows` and `cols` it is as square as n allows; a prime n gives a chain.

    >>> sorted(grid_graph(6)[0])
    [1, 3]
    """
    _at_least("n", n, 2)
    rows, cols = _sides(n, rows, cols, 1)
    return _lattice(rows, cols, wrap=False)


def torus_graph(n: int, rows: int | None = None, cols: int | None = None) -> nx.Graph:
    """Return a grid whose borders are joined; both sides are at least 3.

    A side of 2 would join the same two nodes twice. Without `rows` and `cols` the torus is
    as square as n allows.

    >>> sorted(torus_graph(9)[0])
    [1, 2, 3, 6]
    """
    _at_least("n", n, 2)
    rows, cols = _sides(n, rows, cols, 3)
    return _lattice(rows, cols, wrap=True)


def hypercube_graph(n: int) -> nx.Graph:
    """Return the hypercube: nodes are neighbours if their ids differ in one bit.

    >>> sorted(hypercube_graph(8)[0])
    [1, 2, 4]
    """
    _at_least("n", n, 2)
    bits = n.bit_length() - 1
    if n != 1 << bits:
        raise ValueError(f"n = {n} is not a power of two; nearest: {1 << bits}, {2 << bits}")
    return _graph(n, ((i, i ^ 1 << bit) for i in range(n) for bit in range(bits)))


def random_regular_graph(n: int, degree: int, seed: int = 0) -> nx.Graph:
    """Return a connected random graph in which every node has `degree` neighbours."""
    _at_least("n", n, 2)
    _degree("degree", degree, n)
    if n * degree % 2:
        raise ValueError(
            f"degree = {degree} with n = {n} needs {n} * {degree} half edges, an odd number; "
            f"make either of them even"
        )
    if degree == 1 and n > 2:
        raise ValueError(f"degree = 1 cannot connect n = {n} nodes; at least 2 would")
    draw = random.Random(seed)
    return _until_connected(
        lambda: _regular(n, degree, draw), f"degree = {degree} with n = {n}", "try degree >= 3"
    )


def erdos_renyi_graph(n: int, p: float, seed: int = 0) -> nx.Graph:
    """Return a connected graph in which every pair is joined with probability p.

    Graphs are drawn one after another from `seed` until one is connected (Erdős and Rényi,
    1959; Gilbert, 1959). Beyond 1000 nodes they are drawn in time proportional to the edges
    (Batagelj and Brandes, 2005).
    """
    _at_least("n", n, 2)
    if not 0 < p <= 1:
        raise ValueError(f"p = {p} is not a probability above 0 and up to 1")
    draw = random.Random(seed)
    make = nx.gnp_random_graph if n <= PLAIN_GNP else nx.fast_gnp_random_graph
    enough = min(1.0, 1.5 * math.log(n) / n)
    return _until_connected(
        lambda: make(n, p, seed=draw),
        f"p = {p} with n = {n}",
        f"try p >= 1.5 ln n / n = {enough:.3g}",
    )


def watts_strogatz_graph(n: int, degree: int = 4, rewire: float = 0.2, seed: int = 0) -> nx.Graph:
    """Return a connected small world (Watts and Strogatz, 1998).

    A ring in which everybody knows its `degree` nearest, each edge then moved to a random end
    with probability `rewire`.
    """
    _at_least("n", n, 2)
    _degree("degree", degree, n)
    if degree % 2:
        raise ValueError(f"degree = {degree} is odd; half of it lies on each side of the ring")
    if not 0 <= rewire <= 1:
        raise ValueError(f"rewire = {rewire} is not a probability from 0 to 1")
    draw = random.Random(seed)
    return _until_connected(
        lambda: nx.watts_strogatz_graph(n, degree, rewire, seed=draw),
        f"degree = {degree} with n = {n} and rewire = {rewire}",
        "try degree >= 4",
    )


def barabasi_albert_graph(n: int, attach: int = 2, seed: int = 0) -> nx.Graph:
    """Return a graph with hubs (Barabási and Albert, 1999).

    Nodes come one by one and join `attach` earlier ones, each in proportion to its degree.
    """
    _at_least("n", n, 2)
    _degree("attach", attach, n)
    return nx.barabasi_albert_graph(n, attach, seed=seed)


def exponential_graph(n: int) -> nx.DiGraph:
    """Return the static exponential graph: i sends to ``i + 2^j mod n`` for all ``2^j < n``.

    Directed, every degree is ⌈log₂ n⌉ (Ying et al., 2021).

    >>> sorted(exponential_graph(6).successors(5))
    [0, 1, 3]
    """
    _at_least("n", n, 2)
    graph = nx.DiGraph()
    graph.add_nodes_from(range(n))
    jumps = [1 << j for j in range((n - 1).bit_length())]
    graph.add_edges_from((i, (i + jump) % n) for i in range(n) for jump in jumps)
    return graph


GRAPHS: dict[str, Callable[..., nx.Graph]] = {
    "complete": complete_graph,
    "ring": ring_graph,
    "chain": chain_graph,
    "star": star_graph,
    "binary_tree": binary_tree_graph,
    "grid": grid_graph,
    "torus": torus_graph,
    "hypercube": hypercube_graph,
    "random_regular": random_regular_graph,
    "erdos_renyi": erdos_renyi_graph,
    "watts_strogatz": watts_strogatz_graph,
    "barabasi_albert": barabasi_albert_graph,
    "exponential": exponential_graph,
}


def _at_least(name: str, value: int, least: int) -> None:
    if value < least:
        raise ValueError(f"{name} = {value} is too small; it must be at least {least}")


def _degree(name: str, value: int, n: int) -> None:
    _at_least(name, value, 1)
    if value >= n:
        raise ValueError(f"{name} = {value} must be below n = {n}")


def _sides(n: int, rows: int | None, cols: int | None, least: int) -> tuple[int, int]:
    """Return rows and columns of n nodes, neither side below `least`."""
    for name, side in (("rows", rows), ("cols", cols)):
        if side is None:
            continue
        _at_least(name, side, least)
        if n % side or n // side < least:
            raise ValueError(f"{name} = {side} does not fit n = {n}; {_choices(n, least)}")
    if rows is not None and cols is not None and rows * cols != n:
        raise ValueError(f"rows = {rows} times cols = {cols} is {rows * cols}, but n = {n}")
    if rows is not None:
        return rows, n // rows
    if cols is not None:
        return n // cols, cols
    fitting = _fitting(n, least)
    if not fitting:
        raise ValueError(f"n = {n} has no two sides of at least {least}; {_choices(n, least)}")
    return fitting[-1], n // fitting[-1]


def _fitting(n: int, least: int) -> list[int]:
    """Return the shorter sides of all the rectangles of n nodes."""
    return [side for side in range(least, math.isqrt(n) + 1) if n % side == 0]


def _choices(n: int, least: int) -> str:
    fitting = _fitting(n, least)
    if fitting:
        return "possible: " + ", ".join(f"{side} x {n // side}" for side in fitting)
    below = [m for m in range(least**2, n) if _fitting(m, least)][-1:]
    above = next(m for m in range(max(n + 1, least**2), 2 * n + least**2) if _fitting(m, least))
    return "nearest n: " + ", ".join(map(str, [*below, above]))


def _lattice(rows: int, cols: int, wrap: bool) -> nx.Graph:
    """Return rows of columns, each node joined to the one on its right and the one below."""
    across = cols if wrap else cols - 1
    down = rows if wrap else rows - 1
    right = [(r * cols + c, r * cols + (c + 1) % cols) for r in range(rows) for c in range(across)]
    below = [(r * cols + c, (r + 1) % rows * cols + c) for r in range(down) for c in range(cols)]
    return _graph(rows * cols, right + below)


def _graph(n: int, edges: object) -> nx.Graph:
    # The nodes come first, so that they are kept in the order of their ids.
    graph = nx.Graph()
    graph.add_nodes_from(range(n))
    graph.add_edges_from(edges)
    return graph


def _regular(n: int, degree: int, draw: random.Random) -> nx.Graph:
    # Pairing half edges rarely works out in dense graphs: those are drawn by what they lack.
    if 2 * degree >= n:
        return nx.complement(nx.random_regular_graph(n - 1 - degree, n, seed=draw))
    return nx.random_regular_graph(degree, n, seed=draw)


def _until_connected(make: Callable[[], nx.Graph], what: str, hint: str) -> nx.Graph:
    for _ in range(TRIES):
        graph = make()
        if nx.is_connected(graph):
            return _graph(graph.number_of_nodes(), graph.edges)
    raise ValueError(f"{what} gave no connected graph in {TRIES} draws; {hint}")
