"""D-Cliques: cliques whose members hold, together, about the same share of every label as all.

Bellet, Kermarrec and Lavoie 2022, *D-Cliques: compensating for data heterogeneity with topology
in decentralized federated learning*.
"""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import chain, combinations, pairwise
from pathlib import Path
from typing import Any, Literal

import networkx as nx
import numpy as np
from numpy.typing import NDArray

SWAPS = 1000  # as in the paper

Cliques = list[list[int]]


def d_cliques_graph(
    n: int,
    path: str,
    size: int = 10,
    links: Literal["ring", "fully_connected", "fractal"] = "ring",
    seed: int = 0,
) -> nx.Graph:
    """Return cliques of nodes whose labels complement each other, linked by single edges.

    Nodes are put into cliques at random; then two random cliques at a time swap a pair of nodes,
    drawn among the pairs that bring both closer to the labels of all, 1000 times. The file
    reveals to everybody how many examples of each label each node holds.

    Args:
        n: how many nodes there are.
        path: a JSON file, as ``p2pfl partition show EXPERIMENT --format json`` prints it.
        size: how many nodes a clique has at most.
        links: between the cliques. ``"ring"``: one edge to the next; ``"fully_connected"``: one to
            every other; ``"fractal"``: one to every other of up to `size` cliques, such groups of
            cliques likewise, and so on.
        seed: of the draws.
    """
    if n < 2:
        raise ValueError(f"n = {n} must be at least 2")
    if not size >= 2:
        raise ValueError(f"size = {size} must be at least 2")
    cliques = swapped(label_shares(path, n), size, seed)
    graph = nx.Graph()
    graph.add_nodes_from(range(n))
    for clique in cliques:
        graph.add_edges_from(combinations(clique, 2))
    graph.add_edges_from(_between(cliques, size, links))
    return graph


def label_shares(path: str, n: int) -> NDArray[np.float64]:
    """Return the share of each label in what every node holds, ``[n, labels]``, from a file.

    A node that holds nothing counts as one that holds some of everything.

    Raises:
        ValueError: the file cannot be read, or is not about n nodes.
    """
    try:
        rows = json.loads(Path(path).read_text(encoding="utf-8"))["nodes"]
        labels = [key for key in rows[0] if key not in ("node", "examples")]
        wrong = [row["node"] for row in rows] != list(range(n))
        counts = [[row[label] for label in labels] for row in rows]
    except OSError as error:
        raise ValueError(f"{path} cannot be read: {error.strerror or error}") from None
    except (ValueError, KeyError, TypeError, IndexError, RecursionError):
        raise ValueError(
            f"{path} is not what `p2pfl partition show EXPERIMENT --format json` prints"
        ) from None
    if wrong:
        raise ValueError(f"{path} is about {len(rows)} nodes, not 0 to {n - 1}")
    if not labels or not all(_is_count(count) for row in counts for count in row):
        raise ValueError(f"{path} holds no counts of labels (a regression has none)")
    table = np.array(counts, dtype=np.float64)
    table[table.sum(1) == 0] = table.sum(0)
    shares: NDArray[np.float64] = table / np.maximum(table.sum(1, keepdims=True), 1)
    return shares


def _is_count(value: Any) -> bool:  # noqa: ANN401 - whatever JSON holds
    return type(value) is int and 0 <= value < 2**53


def swapped(shares: NDArray[np.float64], size: int, seed: int, swaps: int = SWAPS) -> Cliques:
    """Return nodes in cliques of about equal size, as many pairs swapped as are tried.

    Args:
        shares: of the labels, ``[n, labels]``.
        size: of a clique, at most.
        seed: of the draws.
        swaps: how many pairs of cliques are tried.
    """
    n, draw = len(shares), random.Random(seed)
    count = -(-n // size)
    nodes = draw.sample(range(n), n)
    cliques = [nodes[i::count] for i in range(count)]
    overall = shares.mean(0)
    for _ in range(swaps if count > 1 else 0):
        one, other = draw.sample(cliques, 2)
        gain = _gains(shares, one, other, overall)
        better = np.argwhere(gain > 1e-12)
        if len(better):
            i, j = draw.choice(better.tolist())
            one[i], other[j] = other[j], one[i]
    return cliques


def skew(shares: NDArray[np.float64], clique: list[int]) -> float:
    """Return how far the mean shares of a clique are from those of all, in the 1-norm."""
    return float(np.abs(shares[clique].mean(0) - shares.mean(0)).sum())


def _gains(
    shares: NDArray[np.float64], one: list[int], other: list[int], overall: NDArray[np.float64]
) -> NDArray[np.float64]:
    """Return by how much each swap would lower the skew of two cliques, ``[one, other]``."""
    moved = shares[other][None, :, :] - shares[one][:, None, :]
    gain = np.zeros((len(one), len(other)))
    for clique, sign in ((one, 1), (other, -1)):
        off = shares[clique].mean(0) - overall
        gain += np.abs(off).sum() - np.abs(off + sign * moved / len(clique)).sum(2)
    return gain


def _between(cliques: Cliques, size: int, links: str) -> list[tuple[int, int]]:
    used: Counter[int] = Counter()  # edges that a node has to other cliques

    def edge(one: list[int], other: list[int]) -> tuple[int, int]:
        ends = tuple(min(clique, key=lambda node: (used[node], node)) for clique in (one, other))
        used.update(ends)
        return ends[0], ends[1]

    if links == "ring":
        around = [*cliques, cliques[0]] if len(cliques) > 2 else cliques
        return [edge(one, other) for one, other in pairwise(around)]
    groups, edges = cliques, []
    together = size if links == "fractal" else len(cliques)
    while len(groups) > 1:
        joined = [groups[i : i + together] for i in range(0, len(groups), together)]
        edges += [edge(*pair) for group in joined for pair in combinations(group, 2)]
        groups = [list(chain.from_iterable(group)) for group in joined]
    return edges
