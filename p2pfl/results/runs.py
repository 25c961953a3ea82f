"""Reading what runs have left: their metrics as columns, their summaries, and what peers wrote."""

from __future__ import annotations

import json
import math
import tomllib
import typing
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from p2pfl import __version__
from p2pfl.errors import UserError
from p2pfl.results.record import (
    EXPERIMENT,
    HEADER,
    METRICS,
    PEERS,
    ROW_TYPES,
    SUMMARY,
    strict,
)
from p2pfl.results.sketches import far_apart, models_of
from p2pfl.runtime.setup import Row

if TYPE_CHECKING:
    from p2pfl.results.predictor import Predictor

Metrics = dict[str, npt.NDArray[Any]]
"""The table of a run, a column for each field of `Row`: int64 or float64, NaN: not measured."""


class Facts(NamedTuple):
    """What a summary says of a run beside its metrics; NaN is what is not known.

    Times go before those in the metrics.
    """

    experiment: str
    on: str
    algorithm: str
    topology: str
    seed: int
    nodes: int
    node_updates: int = 0  # local steps of all nodes
    wall_s: float = math.nan
    virtual_s: float = math.nan
    eval_acc_mean_model: float = math.nan
    eval_loss_mean_model: float = math.nan
    reason: str = ""  # why the run has stopped
    missed: int = 0  # messages waited for in vain
    rejected: int = 0  # messages refused
    one_sided: int = 0  # models mixed without their senders having mixed ours
    attackers: list[int] | None = None  # what else is said is about the others
    attack: str | None = None


def summarise(metrics: Metrics, facts: Facts) -> dict[str, Any]:
    """Return the summary of a run, None for what is not known.

    Accuracy and loss are those of each node's own last evaluation; the consensus distance is
    the mean over the nodes in the last round in which it is known. Bytes are totals.
    """
    summary = measured(metrics) | {
        key: value for key, value in strict(facts._asdict()).items() if value is not None
    }
    unknown = dict.fromkeys((*Facts._fields, "node_updates_per_s"))
    if summary.get("wall_s"):
        summary["node_updates_per_s"] = facts.node_updates / summary["wall_s"]
    return {**unknown, **summary, "version": __version__}


def measured(metrics: Metrics) -> dict[str, Any]:
    """Return the part of a summary that follows from the metrics."""
    _, acc = last_measured(metrics, "eval_acc")
    _, loss = last_measured(metrics, "eval_loss")
    rounds, far = metrics["round"], metrics["consensus_distance"]
    known = ~np.isnan(far)
    last = rounds[known].max() if known.any() else -1
    summary = {
        "rounds": int(rounds.max()) + 1 if len(rounds) else 0,
        "eval_acc_mean": _mean(acc),
        "eval_acc_worst": float(acc.min()) if len(acc) else None,
        "eval_loss_mean": _mean(loss),
        "consensus_distance": _mean(far[known & (rounds == last)]),
        "bytes_sent": int(metrics["bytes_sent"].sum()),
        "bytes_received": int(metrics["bytes_received"].sum()),
    }
    for key in ("wall_s", "virtual_s"):
        times = metrics[key][~np.isnan(metrics[key])]
        summary[key] = float(times.max()) if len(times) else None
    return typing.cast("dict[str, Any]", strict(summary))


def last_measured(
    metrics: Metrics, column: str
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """Return the nodes in which `column` was ever measured, ascending, and its last values."""
    there = np.flatnonzero(~np.isnan(metrics[column]))
    newest_first = there[np.argsort(metrics["round"][there], kind="stable")][::-1]
    nodes, first = np.unique(metrics["node"][newest_first], return_index=True)
    return nodes, metrics[column][newest_first][first]


def columns(rows: Sequence[Row]) -> Metrics:
    """Return rows as columns."""
    fields = zip(*rows, strict=True) if rows else ((),) * len(Row._fields)
    return {
        name: np.array(values, dtype=np.int64 if ROW_TYPES[name] is int else np.float64)
        for name, values in zip(Row._fields, fields, strict=True)
    }


@dataclass(frozen=True)
class Run:
    """A run folder that was read."""

    folder: Path
    summary: dict[str, Any]  # for a run that was broken off, what its metrics say
    experiment: dict[str, Any]
    metrics: Metrics


@dataclass(frozen=True, repr=False)
class Result:
    """What came out of a run.

    Attributes:
        folder: where it was written; None: nowhere.
        summary: as in ``summary.json``.
        metrics: the table as columns; see also `rounds`.
        models: makes the model of a node, or for None the mean model.
    """

    folder: Path | None
    summary: dict[str, Any]
    metrics: Metrics
    models: Callable[[int | None], Predictor]

    @property
    def rounds(self) -> Any:  # noqa: ANN401 - a DataFrame where pandas is installed
        """The metrics as a `pandas.DataFrame`, or without pandas as a list of dictionaries."""
        try:
            import pandas as pd
        except ImportError:
            lists = [values.tolist() for values in self.metrics.values()]
            return [dict(zip(self.metrics, row, strict=True)) for row in zip(*lists, strict=True)]
        return pd.DataFrame(self.metrics)

    def model(self, node: int | None = None) -> Predictor:
        """Return the final model of a node, or the mean model, with its preprocessing."""
        return self.models(node)

    def __repr__(self) -> str:
        get = self.summary.get
        acc = get("eval_acc_mean")
        lines = [f"{get('experiment', 'run')} on {get('on', '?')}: {get('status', '?')}"]
        lines.append(f"{get('nodes', '?')} nodes, {get('rounds', 0)} rounds")
        if acc is not None:
            worst = get("eval_acc_worst", math.nan)
            lines.append(f"accuracy {acc:.4f} (worst node {worst:.4f})")
        lines.append("in memory" if self.folder is None else f"in {self.folder}")
        return f"<Result {'; '.join(lines)}>"


def read_run(path: str | Path) -> Run:
    """Read a run folder, also of a run that was broken off or is still going on.

    Where processes wrote peer by peer and nobody has put their metrics together, that is done.

    Raises:
        UserError: it is no run folder, or a file in it is missing or damaged.
    """
    folder = Path(path)
    summary, experiment = read_summary(folder), read_experiment(folder)
    rows = read_rows(folder / METRICS)
    if not rows and (folder / PEERS).is_dir():
        rows = merge_peers(folder)
    metrics = columns(rows)
    told = {key: value for key, value in measured(metrics).items() if value is not None}
    # What a summary says of a run that is going on, it said before the first round.
    summary = summary | told if summary.get("status") == "running" else told | summary
    return Run(folder, summary, experiment, metrics)


def read_summary(folder: Path) -> dict[str, Any]:
    """Read ``summary.json``; a `UserError` says if the folder is no run."""
    text = _read(folder, SUMMARY)
    try:
        summary = json.loads(text)
    except ValueError as error:
        raise UserError(f"{folder / SUMMARY} is not valid JSON: {error}") from error
    if not isinstance(summary, dict):
        raise UserError(f"{folder / SUMMARY} is not the summary of a run")
    return summary


def read_experiment(folder: Path) -> dict[str, Any]:
    """Read ``experiment.toml``; a `UserError` says if the folder is no run."""
    text = _read(folder, EXPERIMENT)
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{folder / EXPERIMENT} is not valid TOML: {error}") from error


def merge_peers(folder: Path) -> list[Row]:
    """Put together what peers that ran as processes have written, by round and node.

    The distance of each model from the mean model is estimated from the sketches of the
    peers which have that round; of one peer alone among several it is not known.

    Raises:
        UserError: one of their files is damaged.
    """
    peers = sorted(path for path in (folder / PEERS).glob("*") if (path / METRICS).is_file())
    by_round: dict[int, list[tuple[Row, Tensor]]] = {}
    for peer in peers:
        rows = read_rows(peer / METRICS)
        for row, mark in zip(rows, models_of(peer, len(rows)), strict=True):
            by_round.setdefault(row.round, []).append((row, mark))
    merged = []
    for number in sorted(by_round):
        together = sorted(by_round[number], key=lambda pair: pair[0].node)
        far = far_apart(torch.stack([mark for _, mark in together]), alone=len(peers) == 1)
        merged += [
            row._replace(consensus_distance=d) for (row, _), d in zip(together, far, strict=True)
        ]
    return merged


def read_rows(path: Path) -> list[Row]:
    """Read metrics; a last line that was not written to its end is left out.

    Without a whole first line there are no rows: the disk may have been full.

    Raises:
        UserError: the file is missing or damaged.
    """
    lines = _whole_lines(path, _read(path.parent, path.name))
    return [_row(path, number, line) for number, line in enumerate(lines, start=2)]


def sound_rows(path: Path) -> list[tuple[Row, int]]:
    """Read metrics up to the first line that is damaged, as a power cut may leave it.

    Returns:
        the rows, each with where its line ends, in bytes.

    Raises:
        UserError: the file cannot be read, or its columns are those of another version.
    """
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    rows, end = [], len(HEADER)
    for number, line in enumerate(_whole_lines(path, text), start=2):
        try:
            row = _row(path, number, line)
        except UserError:
            break
        end += len(line) + 1
        rows.append((row, end))
    return rows


def _whole_lines(path: Path, text: str) -> list[str]:
    """Return the lines of metrics below the first, without one that has no end."""
    header, *lines = text.split("\n")
    if lines and f"{header}\n" != HEADER:
        raise UserError(f"{path}: its columns are not those of a run of this version")
    return lines[:-1]


def _row(path: Path, number: int, line: str) -> Row:
    texts = line.split(",")
    try:
        return Row._make(
            int(text) if kind is int else float(text or "nan")
            for text, kind in zip(texts, ROW_TYPES.values(), strict=True)
        )
    except ValueError:
        raise UserError(f"{path}, line {number}: {line[:80]!r} is not a line of metrics") from None


def _mean(values: npt.NDArray[np.float64]) -> float:
    return float(values.mean()) if len(values) else math.nan


def _read(folder: Path, name: str) -> str:
    path = folder / name
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        if not folder.is_dir():
            raise UserError(f"there is no run folder {folder}") from error
        raise UserError(f"{folder} is not a run folder: it has no {name}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error
