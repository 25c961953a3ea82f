"""What the runs of a sweep come to: a row for each run, and over the seeds for each combination."""

from __future__ import annotations

import csv
import io
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.table import Table
from rich.text import Text

from p2pfl import files
from p2pfl.results.report import UNKNOWN, seconds, size
from p2pfl.sweep.combine import Run
from p2pfl.sweep.values import brief

Row = dict[str, Any]

# What is told of each run, as in its summary.
FIGURES = (
    "rounds",
    "eval_acc_mean",
    "eval_acc_worst",
    "eval_acc_mean_model",
    "eval_loss_mean",
    "eval_loss_mean_model",
    "alone_mean",
    "pooled",
    "consensus_distance",
    "bytes_sent",
    "node_updates",
    "wall_s",
    "virtual_s",
)


def row(run: Run, summary: Row, error: str) -> Row:
    """Return the row of a run: what is varied, how it ended, and its figures.

    Args:
        run: which run.
        summary: as in its folder; empty if it did not get as far as a folder.
        error: what went wrong, if anything.
    """
    status = summary.get("status", "failed" if error else "not run")
    return {
        "run": run.name,
        **_plain(run.combination.varied),
        "seed": run.seed,
        "status": "failed" if error else status,
        **{key: summary.get(key) for key in FIGURES},
        "error": error or summary.get("error", ""),
    }


def aggregate(runs: Sequence[Run], table: Sequence[Row]) -> list[Row]:
    """Return a row for each combination, over its seeds that finished.

    Of each figure there are the mean and the sample standard deviation, which one seed has
    not; ``n`` is how many seeds there are, ``failed`` how many did not finish.
    """
    together: dict[str, list[Row]] = {}
    for run, each in zip(runs, table, strict=True):
        together.setdefault(run.combination.slug, []).append(each)
    combinations = {run.combination.slug: run.combination for run in runs}
    return [
        {
            "combination": combinations[slug].label,
            **_plain(combinations[slug].varied),
            **_over_seeds(rows),
        }
        for slug, rows in together.items()
    ]


def _over_seeds(rows: Sequence[Row]) -> Row:
    done = [row for row in rows if row["status"] == "finished"]
    result: Row = {"n": len(done), "failed": len(rows) - len(done)}
    for key in FIGURES:
        values = [row[key] for row in done if row[key] is not None]
        result[f"{key}_mean"] = statistics.fmean(values) if values else None
        result[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else None
    return result


def write_csv(path: Path, rows: Sequence[Row]) -> None:
    """Write rows with the same keys as a table; what is not known stays empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    files.replace(path, text.getvalue().encode())


def summary_table(rows: Sequence[Row]) -> Table:
    """Return the rows of `aggregate` for people: mean ± standard deviation over the seeds."""
    figures = {
        key: title
        for key, title in _TITLES.items()
        if any(row[f"{key}_mean"] is not None for row in rows)
    }
    counts = ["n", *(["failed"] if any(row["failed"] for row in rows) else [])]
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("combination", overflow="fold")
    for title in (*counts, *figures.values()):
        table.add_column(title, justify="right", no_wrap=True)
    for row in rows:
        cells = [*(str(row[key]) for key in counts), *(_cell(row, key) for key in figures)]
        table.add_row(Text(row["combination"]), *cells)
    return table


_TITLES = {
    "eval_acc_mean": "accuracy",
    "eval_acc_worst": "worst",
    "alone_mean": "alone",
    "pooled": "pooled",
    "eval_loss_mean": "loss",
    "consensus_distance": "consensus",
    "bytes_sent": "sent",
    "wall_s": "wall",
}


_WITHOUT_SD: dict[str, Callable[[float], str]] = {
    "consensus_distance": lambda mean: f"{mean:.3g}",
    "bytes_sent": size,
    "wall_s": seconds,
}


def _cell(row: Row, key: str) -> str:
    mean, sd = row[f"{key}_mean"], row[f"{key}_sd"]
    if mean is None:
        return UNKNOWN
    if key in _WITHOUT_SD:
        return _WITHOUT_SD[key](mean)
    has_accuracy = row["eval_acc_mean_mean"] is not None
    if key.startswith("eval_acc") or (key in ("alone_mean", "pooled") and has_accuracy):
        return f"{100 * mean:.2f}" + ("" if sd is None else f" ± {100 * sd:.2f}") + " %"
    return f"{mean:.4g}" + ("" if sd is None else f" ± {sd:.2g}")


def _plain(varied: Row) -> Row:
    """Return varied values as cells: sections and lists as texts."""
    return {
        key: brief(value) if isinstance(value, dict | list) else value
        for key, value in varied.items()
    }
