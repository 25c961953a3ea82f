"""Runs side by side: tables for the terminal, and what they say as JSON."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import networkx as nx
import numpy as np
from rich.table import Table
from rich.text import Text

from p2pfl.errors import UserError
from p2pfl.experiment import config
from p2pfl.results.runs import Run, last_measured
from p2pfl.topology import GRAPHS, read_network

NODES_SHOWN = 64  # nodes up to which a run is told node by node
ATTACKERS_SHOWN = 8  # attackers up to which a run says who they are
UNKNOWN = "–"
_PREFIXES = ("", "k", "M", "G", "T", "P")


class Measure(NamedTuple):
    """A line of the comparison: what a run says, as text."""

    title: str
    tell: Callable[[Run], str]
    optional: bool = False  # left out when no run knows it


def labels(runs: Sequence[Run]) -> list[str]:
    """Return a short name for each run, all different: as much of the path as that takes."""
    paths = [run.folder.resolve() for run in runs]
    for parts in range(1, max((len(path.parts) for path in paths), default=1) + 1):
        names = ["/".join(path.parts[-parts:]) for path in paths]
        if len(set(names)) == len(set(paths)):
            break
    seen: Counter[str] = Counter()
    for place, name in enumerate(names):
        seen[name] += 1
        names[place] = name if seen[name] == 1 else f"{name} ({seen[name]})"
    return names


def compare(runs: Sequence[Run], upright: bool = False) -> Table:
    """Return a table with a line for each run, or `upright` with a column for each."""
    kept = [m for m in MEASURES if not m.optional or any(m.tell(run) != UNKNOWN for run in runs)]
    names = labels(runs)
    told = [[_status(cell) for cell in (m.tell(run) for m in kept)] for run in runs]
    table = Table(box=None, pad_edge=False, header_style="bold")
    if upright:
        table.add_column("")
        for name in names:
            table.add_column(Text(name), justify="right", overflow="fold")
        for place, measure in enumerate(kept):
            table.add_row(measure.title, *(cells[place] for cells in told))
        return table
    table.add_column("run", overflow="fold")
    for measure in kept:
        words = measure.title in ("on", "status", "algorithm", "topology")
        table.add_column(measure.title, justify="left" if words else "right")
    for name, cells in zip(names, told, strict=True):
        table.add_row(Text(name), *cells)
    return table


def node_table(run: Run) -> Table:
    """Return a table with a line for each node of a run: how it stood in the end."""
    found = nodes(run)
    kept = [key for key in _NODE_COLUMNS if any(row[key] is not None for row in found)]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for key in kept:
        table.add_column(_NODE_COLUMNS[key][0], justify="right")
    for row in found:
        table.add_row(*(_NODE_COLUMNS[key][1](row[key]) for key in kept))
    return table


def unmeasured(runs: Sequence[Run]) -> list[str]:
    """Return what none of the runs has measured, in words."""
    return [
        words
        for column, words in _MEASURABLE.items()
        if not any(len(last_measured(run.metrics, column)[0]) for run in runs)
    ]


def nodes(run: Run) -> list[dict[str, Any]]:
    """Return how each node stood in the end, None for what was never measured.

    `alone` is the accuracy it would reach without the others, where that was tried.
    """
    metrics = run.metrics
    ids, first, count = np.unique(metrics["node"], return_index=True, return_counts=True)
    result: list[dict[str, Any]] = [
        {
            "node": int(node),
            "rounds": int(rounds),
            "num_examples": int(metrics["num_examples"][row]),
            "bytes_sent": int(metrics["bytes_sent"][metrics["node"] == node].sum()),
        }
        for node, row, rounds in zip(ids, first, count, strict=True)
    ]
    for column in ("eval_acc", "eval_loss", "train_loss"):
        known = dict(zip(*(part.tolist() for part in last_measured(metrics, column)), strict=True))
        for row in result:
            value = known.get(row["node"], math.nan)
            row[column] = value if math.isfinite(value) else None
    alone = run.summary.get("alone") or []
    is_share = run.summary.get("eval_acc_mean") is not None
    for row in result:
        row["alone"] = alone[row["node"]] if is_share and row["node"] < len(alone) else None
    return result


def as_json(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return what the tables say as values for JSON, a dictionary for each run."""
    return [
        {"run": name, "folder": str(run.folder), **run.summary}
        | ({"per_node": nodes(run)} if _is_small(run) else {})
        for name, run in zip(labels(runs), runs, strict=True)
    ]


def graph_of(run: Run) -> nx.Graph | None:
    """Return the graph of a run; None if there is none to be had (any more)."""
    section, n = run.experiment.get("topology"), _count(run)
    if section is None or n is None:
        return None
    if isinstance(section, str) and Path(section).suffix and ":" not in section:
        section = {"name": "file", "path": section}
    if isinstance(section, dict) and section.get("name") == "file":
        path = Path(str(run.summary.get("base") or ".")) / str(section.get("path", ""))
        return read_network(path).graph if path.is_file() else None
    try:
        graph: nx.Graph = config.read("topology", section, config.Kind(GRAPHS, given=1)).build(
            "topology", n
        )
    except UserError:  # a topology that is no single graph, or of another version
        return None
    return graph


def size(count: float | None) -> str:
    """Return a number of bytes as people read it.

    >>> size(512), size(1_234_567), size(None)
    ('512 B', '1.23 MB', '–')
    """
    if count is None:
        return UNKNOWN
    step, value = 0, float(count)
    while value >= 999.5 and step + 1 < len(_PREFIXES):
        step, value = step + 1, value / 1000
    return f"{value:.3g} {_PREFIXES[step]}B"


def seconds(value: float | None) -> str:
    """Return a time as people read it.

    >>> seconds(0.0123), seconds(75.2), seconds(7260), seconds(None)
    ('0.012 s', '75.2 s', '2 h 01 min', '–')
    """
    if value is None:
        return UNKNOWN
    if value < 600:
        return f"{value:.3f} s" if value < 1 else f"{value:.1f} s"
    minutes = round(value / 60)
    return f"{minutes // 60} h {minutes % 60:02d} min" if minutes >= 60 else f"{minutes} min"


def _number(value: float | None, digits: int = 3) -> str:
    if value == 0:
        return "0"
    return UNKNOWN if value is None else f"{value:#.{digits}g}"


def _share(value: float | None) -> str:
    return UNKNOWN if value is None else f"{100 * value:.2f} %"


def _of(key: str, tell: Callable[[Any], str]) -> Callable[[Run], str]:
    def told(run: Run) -> str:
        value = run.summary.get(key)
        return UNKNOWN if value is None or value == "" else tell(value)

    return told


def _of_score(key: str) -> Callable[[Run], str]:
    """Tell what the baselines reached: accuracies, or losses where there are none."""

    def told(run: Run) -> str:
        is_share = run.summary.get("eval_acc_mean") is not None
        return _of(key, _share if is_share else lambda value: _number(value, 4))(run)

    return told


def _section(key: str) -> Callable[[Run], str]:
    def told(run: Run) -> str:
        section = run.experiment.get(key)
        name = section.get("name") if isinstance(section, dict) else section
        return str(run.summary.get(key) or name or UNKNOWN)

    return told


def _attackers(run: Run) -> str:
    who = run.summary.get("attackers")
    if not who:
        return UNKNOWN
    listed = ", ".join(map(str, who)) if len(who) <= ATTACKERS_SHOWN else str(len(who))
    return f"{listed} ({run.summary.get('attack')})"


def _nodes(run: Run) -> str:
    count = _count(run)
    return UNKNOWN if count is None else str(count)


MEASURES: tuple[Measure, ...] = (
    Measure("on", _of("on", str)),
    Measure("status", _of("status", str)),
    Measure("nodes", _nodes),
    Measure("algorithm", _section("algorithm")),
    Measure("topology", _section("topology")),
    Measure("attackers", _attackers, optional=True),
    Measure("rounds", _of("rounds", str)),
    Measure("accuracy mean", _of("eval_acc_mean", _share), optional=True),
    Measure("worst", _of("eval_acc_worst", _share), optional=True),
    Measure("mean model", _of("eval_acc_mean_model", _share), optional=True),
    Measure("alone", _of_score("alone_mean"), optional=True),
    Measure("pooled", _of_score("pooled"), optional=True),
    Measure("loss", _of("eval_loss_mean", lambda value: _number(value, 4)), optional=True),
    Measure("consensus distance", _of("consensus_distance", _number), optional=True),
    Measure("sent", _of("bytes_sent", size)),
    Measure("wall", _of("wall_s", seconds)),
    Measure("virtual", _of("virtual_s", seconds), optional=True),
)
"""What is compared, in this order."""


_NODE_COLUMNS: dict[str, tuple[str, Callable[[Any], str]]] = {
    "node": ("node", str),
    "rounds": ("rounds", str),
    "num_examples": ("examples", str),
    "eval_acc": ("accuracy", _share),
    "alone": ("alone", _share),
    "eval_loss": ("loss", lambda value: _number(value, 4)),
    "train_loss": ("training loss", lambda value: _number(value, 4)),
    "bytes_sent": ("sent", size),
}

_MEASURABLE = {
    "eval_acc": "accuracy",
    "eval_loss": "loss on test examples",
    "train_loss": "loss in training",
    "consensus_distance": "consensus distance",
}


def _status(cell: str) -> Text:
    style = {"failed": "red", "interrupted": "yellow", "running": "cyan"}.get(cell, "")
    return Text(cell, style=style)


def _count(run: Run) -> int | None:
    nodes = run.summary.get("nodes", run.experiment.get("nodes"))
    return nodes if isinstance(nodes, int) else None


def _is_small(run: Run) -> bool:
    return (_count(run) or 0) <= NODES_SHOWN
