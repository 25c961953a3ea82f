"""Pictures of runs, laid over one another: what they reached, after how long, for how much."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import networkx as nx
import numpy as np
import numpy.typing as npt

from p2pfl.errors import UserError
from p2pfl.results.churned import Mark, clock, draw_marks, legend_of, marks
from p2pfl.results.report import graph_of, labels
from p2pfl.results.runs import Metrics, Run
from p2pfl.topology import draw

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito (2008): told apart by colour-blind people too. Yellow is too pale for lines.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
DASHES: tuple[Any, ...] = ("-", (0, (5, 2)), (0, (1, 1.5)), (0, (6, 2, 1, 2)))
FEW = 12  # points up to which each is marked
INK, GRID = "#1d2733", "#d9e0e7"
MOST_EDGES = 20_000  # beyond these a drawn graph is one grey area

Floats = npt.NDArray[np.float64]


class Curve(NamedTuple):
    """A column round by round, over the nodes in which it was measured; ``[rounds]`` each."""

    rounds: Floats  # counted from 1
    mean: Floats
    low: Floats
    high: Floats


class Panel(NamedTuple):
    """One pair of axes: what is drawn against what."""

    y: str  # the column
    title: str
    x: str = "round"  # a column, or "round" or "spent": bytes a node has sent so far
    scale: str = "linear"  # or "log", or "auto": log for positive values far apart


class Drawn(NamedTuple):
    """A run and how it looks."""

    run: Run
    label: str
    style: Mapping[str, Any]
    marks: Sequence[Mark] = ()


_NAMES: Mapping[str, str] = {
    "round": "round",
    "spent": "bytes sent per node so far",
    "wall_s": "time (s)",
    "virtual_s": "virtual time (s)",
    "eval_acc": "accuracy",
    "eval_loss": "loss",
    "train_loss": "training loss",
    "consensus_distance": "squared distance from the mean model",
    "bytes_sent": "bytes",
}


def draw_runs(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Draw everything that was measured into PNG files; return their paths.

    Raises:
        UserError: matplotlib is not installed, or the folder cannot be written.
    """
    require_matplotlib()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"{folder} cannot be made: {error.strerror or error}") from error
    named = enumerate(zip(runs, labels(runs), strict=True))
    drawn = [Drawn(run, name, style(i), marks(run)) for i, (run, name) in named]
    paths = [
        path
        for name, panels in _pictures(runs).items()
        if (path := picture(drawn, panels, folder / f"{name}.png")) is not None
    ]
    return paths + _draw_topologies(runs, folder)


def curve(metrics: Metrics, column: str) -> Curve:
    """Return a column round by round: mean, least and most over the nodes."""
    there = np.flatnonzero(np.isfinite(metrics[column]))
    there = there[np.argsort(metrics["round"][there], kind="stable")]
    if not len(there):
        return Curve(*(np.empty(0),) * 4)
    rounds, start, count = np.unique(metrics["round"][there], return_index=True, return_counts=True)
    values = metrics[column][there].astype(np.float64)
    return Curve(
        rounds + 1.0,
        np.add.reduceat(values, start) / count,
        np.minimum.reduceat(values, start),
        np.maximum.reduceat(values, start),
    )


def _pictures(runs: Sequence[Run]) -> dict[str, list[Panel]]:
    """Return the panels of each picture, by the name of its file."""
    quality = next((key for key in ("eval_acc", "eval_loss") if _has(runs, key)), "train_loss")
    name = _NAMES[quality]
    return {
        "accuracy": [Panel("eval_acc", "Accuracy")],
        "loss": [
            Panel("eval_loss", "Loss on test examples", scale="auto"),
            Panel("train_loss", "Loss in training", scale="auto"),
        ],
        "consensus": [Panel("consensus_distance", "Consensus distance", scale="log")],
        "bytes": [
            Panel(quality, f"{name.capitalize()} for bytes sent", "spent"),
            Panel("bytes_sent", "Bytes sent per node and round"),
        ],
        "time": [
            Panel(quality, f"{name.capitalize()} over time", "wall_s"),
            Panel(quality, f"{name.capitalize()} over virtual time", "virtual_s"),
        ],
    }


def picture(drawn: Sequence[Drawn], panels: Sequence[Panel], path: Path) -> Path | None:
    """Draw the panels that anything was measured for; None if that is none of them."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    runs = [each.run for each in drawn]
    panels = [p for p in panels if any(_measured(run, p) for run in runs)]
    if not panels:
        return None
    figure = Figure(figsize=(6.4 * len(panels), 4.4), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)  # draws into memory and needs no display
    all_axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, panel in zip(all_axes, panels, strict=True):
        _draw_panel(axes, panel, drawn)
    _add_legend(figure, all_axes[0], drawn, panels)
    _save(figure, path)
    return path


def _draw_panel(axes: Axes, panel: Panel, drawn: Sequence[Drawn]) -> None:
    _dress(axes, panel)
    curves = [_points(each.run, panel) for each in drawn]
    positive = [c.mean[c.mean > 0] for c in curves]
    log = _is_log(panel, np.concatenate(positive), curves)
    for each, points in zip(drawn, curves, strict=True):
        _draw_curve(axes, each, points, log)
    if log:
        axes.set_yscale("log")
    elif panel.scale == "log":
        axes.set_yticks([0])
        axes.text(0.5, 0.9, "all models are equal", transform=axes.transAxes, ha="center")
    if panel.y == "bytes_sent":
        axes.set_ylim(bottom=0)
    _format_axes(axes, panel)
    for lane, each in enumerate(each for each in drawn if _is_marked(each, panel)):
        draw_marks(axes, each.marks, panel.x, each.style["color"], lane)


def _is_marked(each: Drawn, panel: Panel) -> bool:
    """Say whether the axis tells when something has happened to a run."""
    return bool(each.marks) and panel.x in ("round", clock(each.run.metrics))


def _draw_curve(axes: Axes, each: Drawn, points: Curve, log: bool) -> None:
    x, mean, low, high = points
    label = each.label
    if not len(x):
        label += " (not measured)"
    elif log and not (mean > 0).any():
        label += " (0 throughout)"
    if log:  # what is zero has no place on the axis
        mean, low, high = (np.where(part > 0, part, np.nan) for part in (mean, low, high))
        low = np.where(np.isnan(low), mean, low)
    if (high > low).any():
        axes.fill_between(x, low, high, color=each.style["color"], alpha=0.15, linewidth=0)
    marker = "o" if len(x) <= FEW else ""
    axes.plot(x, mean, label=label, linewidth=1.8, marker=marker, markersize=3.5, **each.style)


def _points(run: Run, panel: Panel) -> Curve:
    """Return the curve of a run with the panel's x in place of the rounds."""
    points = curve(run.metrics, panel.y)
    if panel.x == "round":
        return points
    if panel.x == "spent":
        sent = curve(run.metrics, "bytes_sent")
        at = Curve(sent.rounds, sent.mean.cumsum(), sent.low, sent.high)
    else:
        at = curve(run.metrics, panel.x)
    _, ours, theirs = np.intersect1d(points.rounds, at.rounds, return_indices=True)
    return Curve(at.mean[theirs], *(part[ours] for part in points[1:]))


def _is_log(panel: Panel, positive: Floats, curves: Sequence[Curve]) -> bool:
    if panel.scale == "auto":
        everything = np.concatenate([c.mean for c in curves])
        return len(positive) == len(everything) and bool(positive.max() > 30 * positive.min())
    return panel.scale == "log" and len(positive) > 0


def _dress(axes: Axes, panel: Panel) -> None:
    axes.set_title(panel.title, fontsize=11, loc="left", color=INK, fontweight="bold")
    axes.set_xlabel(_NAMES[panel.x], color=INK)
    axes.set_ylabel(_NAMES[panel.y], color=INK)
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(colors=INK, labelsize=9)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color("#8fa3b8")


def _format_axes(axes: Axes, panel: Panel) -> None:
    from matplotlib.ticker import EngFormatter, MaxNLocator, PercentFormatter

    if panel.y == "eval_acc":
        axes.yaxis.set_major_formatter(PercentFormatter(1.0))
    if panel.y == "bytes_sent":
        axes.yaxis.set_major_formatter(EngFormatter("B"))
    if panel.x == "spent":
        axes.xaxis.set_major_formatter(EngFormatter("B"))
    if panel.x == "round":
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _add_legend(
    figure: Figure, axes: Axes, drawn: Sequence[Drawn], panels: Sequence[Panel]
) -> None:
    """Say which run is which, if there are several, and what marks mean, if there are any."""
    handles, names = axes.get_legend_handles_labels() if len(drawn) > 1 else ([], [])
    shown = [each for each in drawn if any(_is_marked(each, panel) for panel in panels)]
    more, words = legend_of([mark for each in shown for mark in each.marks])
    handles, names = [*handles, *more], [*names, *words]
    if not names:
        return
    width, _ = figure.get_size_inches()
    longest = max(len(name) for name in names)
    fit = max(1, min(len(names), int(width * 11 / (longest + 6))))
    figure.legend(handles, names, loc="outside lower center", ncols=fit, frameon=False, fontsize=9)


def _draw_topologies(runs: Sequence[Run], folder: Path) -> list[Path]:
    """Draw each graph once."""
    graphs: list[tuple[str, nx.Graph]] = []
    for run, name in zip(runs, labels(runs), strict=True):
        graph = graph_of(run)
        if graph is None or graph.number_of_edges() > MOST_EDGES:
            continue
        if not any(nx.utils.graphs_equal(graph, other) for _, other in graphs):
            graphs.append((name.replace("/", "_"), graph))
    paths = []
    for name, graph in graphs:
        path = folder / ("topology.png" if len(graphs) == 1 else f"topology-{name}.png")
        draw(graph, path)
        paths.append(path)
    return paths


def style(index: int) -> dict[str, Any]:
    """Return the colour and dash of the line number `index`."""
    dash = DASHES[index // len(COLOURS) % len(DASHES)]
    return {"color": COLOURS[index % len(COLOURS)], "linestyle": dash}


def _measured(run: Run, panel: Panel) -> bool:
    if panel.x == "spent" or panel.y == "bytes_sent":
        return bool(run.metrics["bytes_sent"].any())
    return len(_points(run, panel).mean) > 0


def _has(runs: Sequence[Run], column: str) -> bool:
    return any(bool(np.isfinite(run.metrics[column]).any()) for run in runs)


def _save(figure: Figure, path: Path) -> None:
    try:
        figure.savefig(path, format="png", facecolor="white")
    except OSError as error:
        raise UserError(f"{path} cannot be written: {error.strerror or error}") from error


def require_matplotlib() -> None:
    """Refuse to draw without matplotlib, saying how to get it."""
    try:
        import matplotlib as mpl
    except ImportError:
        raise UserError("plots need matplotlib: pip install 'p2pfl-gossip[plots]'") from None
    del mpl
