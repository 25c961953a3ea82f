"""The picture of a sweep: a line for each combination, the mean over its seeds, with a band."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from p2pfl.errors import UserError
from p2pfl.results import plots
from p2pfl.results.runs import Metrics, columns, read_run
from p2pfl.results.runs import Run as Finished
from p2pfl.sweep.combine import Run
from p2pfl.sweep.folder import RUNS

QUALITIES = {"eval_acc": "Accuracy", "eval_loss": "Loss", "train_loss": "Loss in training"}


def draw_sweep(runs: Sequence[Run], folder: Path) -> Path | None:
    """Draw how good the models were round by round into ``plots/compare.png``.

    It is the accuracy, or the loss where there is none. A seed counts with the mean over its
    nodes.

    Args:
        runs: those that finished.
        folder: the folder of the sweep.

    Returns:
        the path; None if nothing was measured.

    Raises:
        UserError: matplotlib is not installed, or the file cannot be written.
    """
    plots.require_matplotlib()
    together: dict[str, list[Metrics]] = {}
    for run in runs:
        metrics = read_run(folder / RUNS / run.name).metrics
        together.setdefault(run.combination.label, []).append(metrics)
    column = next((key for key in QUALITIES if _is_measured(together, key)), None)
    if column is None:
        return None
    title = f"{QUALITIES[column]}: mean and range over the seeds"
    panel = plots.Panel(column, title, scale="linear" if column == "eval_acc" else "auto")
    drawn = [
        plots.Drawn(_over_seeds(seeds, column), label, plots.style(i))
        for i, (label, seeds) in enumerate(together.items())
    ]
    path = folder / "plots" / "compare.png"
    try:
        path.parent.mkdir(exist_ok=True)
    except OSError as error:
        raise UserError(f"{path.parent} cannot be made: {error.strerror or error}") from error
    return plots.picture(drawn, [panel], path)


def _is_measured(together: dict[str, list[Metrics]], column: str) -> bool:
    return any(np.isfinite(m[column]).any() for seeds in together.values() for m in seeds)


def _over_seeds(seeds: Sequence[Metrics], column: str) -> Finished:
    """Return a run whose nodes are the seeds, so that it is drawn as runs are."""
    curves = [plots.curve(metrics, column) for metrics in seeds]
    metrics: dict[str, Any] = columns([])
    metrics["round"] = np.concatenate([c.rounds - 1 for c in curves]).astype(np.int64)
    metrics[column] = np.concatenate([c.mean for c in curves])
    return Finished(Path(), {}, {}, metrics)
