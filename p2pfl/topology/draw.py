"""Pictures of graphs."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import networkx as nx
import numpy as np
from numpy.typing import NDArray

from p2pfl.errors import UserError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

CIRCLE = 40  # nodes up to which a regular graph is laid out on a circle
SPRINGS = 1500  # nodes beyond which springs take too long and everything is a circle
LABELLED = 60  # nodes up to which ids are written into them
INK, EDGE, FILL = "#1d2733", "#8fa3b8", "#2f6f9f"


def draw(graph: nx.Graph, path: str | Path, labels: Mapping[int, str] | None = None) -> None:
    """Draw a graph into a PNG file, the larger a node the more neighbours it has.

    Small regular graphs are laid out on a circle, others by springs (Fruchterman and Reingold,
    1991), the same in every call. Ids are written into the nodes of small graphs; `labels`
    replaces them.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("drawing needs matplotlib: pip install 'p2pfl-gossip[plots]'") from None
    figure = Figure(figsize=(7, 7), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory and needs no display
    axes = figure.add_subplot()
    axes.set_axis_off()
    axes.set_aspect("equal")
    axes.margins(0.08)
    if len(graph) == 1:
        axes.set(xlim=(-1, 1), ylim=(0, 2))
    places = _layout(graph)
    radii = _radii(graph)
    _draw_edges(axes, graph, places, radii)
    _draw_nodes(axes, graph, places, radii, labels)
    try:
        figure.savefig(path, format="png", facecolor="white")
    except OSError as error:
        raise UserError(f"{path}: cannot be written: {error.strerror or error}") from None


def _layout(graph: nx.Graph) -> NDArray[np.float64]:
    """Return the place of each node, ``[n, 2]``, in the order of the graph."""
    n = len(graph)
    regular = len({degree for _, degree in graph.degree}) == 1
    if n > SPRINGS or (regular and n <= CIRCLE):
        angle = math.pi / 2 - 2 * math.pi * np.arange(n) / n  # node 0 at the top, clockwise
        return np.stack([np.cos(angle), np.sin(angle)], 1)
    spring = nx.spring_layout(nx.Graph(graph), k=2.4 / math.sqrt(n), iterations=300, seed=0)
    return np.array([spring[node] for node in graph], dtype=np.float64)


def _radii(graph: nx.Graph) -> NDArray[np.float64]:
    """Return how large to draw each node, in points."""
    degree = np.array([degree for _, degree in graph.degree], dtype=np.float64)
    usual = 14 * min(1.0, math.sqrt(24 / len(graph)))
    radii: NDArray[np.float64] = usual * (0.75 + 0.5 * np.sqrt(degree / max(1.0, degree.max())))
    return radii


def _draw_edges(
    axes: Axes, graph: nx.Graph, places: NDArray[np.float64], radii: NDArray[np.float64]
) -> None:
    from matplotlib.collections import LineCollection
    from matplotlib.patches import FancyArrowPatch

    order = {node: index for index, node in enumerate(graph)}
    ends = [(order[a], order[b]) for a, b in graph.edges()]
    width = 1.6 * min(1.0, math.sqrt(60 / max(1, len(ends))))
    alpha = max(0.25, min(0.9, 12 / math.sqrt(max(1, len(ends)))))
    if not graph.is_directed():
        lines = [places[[a, b]] for a, b in ends]
        axes.add_collection(LineCollection(lines, colors=EDGE, linewidths=width, alpha=alpha))
        return
    for a, b in ends:
        both = graph.has_edge(b, a)
        style: dict[str, Any] = {"color": EDGE, "linewidth": width, "alpha": alpha}
        arrow = FancyArrowPatch(
            places[a],
            places[b],
            arrowstyle="-|>",
            mutation_scale=6 + 5 * width,
            shrinkA=radii[a],
            shrinkB=radii[b] + 1,
            connectionstyle=f"arc3,rad={0.12 if both else 0.0}",
            **style,
        )
        axes.add_patch(arrow)


def _draw_nodes(
    axes: Axes,
    graph: nx.Graph,
    places: NDArray[np.float64],
    radii: NDArray[np.float64],
    labels: Mapping[int, str] | None,
) -> None:
    axes.scatter(
        places[:, 0], places[:, 1], s=(2 * radii) ** 2 * 0.9, c=FILL, edgecolors="white", zorder=3
    )
    if labels is None and len(graph) > LABELLED:
        return
    for node, place, radius in zip(graph, places, radii, strict=True):
        text = str(node) if labels is None else labels.get(node, "")
        inside = len(text) <= 2
        axes.annotate(
            text,
            place,
            xytext=(0, 0) if inside else (0, -radius - 2),
            textcoords="offset points",
            ha="center",
            va="center_baseline" if inside else "top",
            fontsize=max(5.0, 0.8 * radius) if inside else 8,
            color="white" if inside else INK,
            bbox=None if inside else {"facecolor": "white", "alpha": 0.7, "lw": 0, "pad": 0.5},
            zorder=4,
        )
