"""Runs to whose peers things happened: how they recovered, in a table, and marks for pictures."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from rich.table import Table
from rich.text import Text

from p2pfl.errors import UserError
from p2pfl.results.record import EVENTS
from p2pfl.results.report import UNKNOWN, labels, seconds, size
from p2pfl.results.runs import Metrics, Run

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes

MARGIN = 0.01  # of accuracy, by which models may be worse and count as recovered
SPAN = "parted"
GLYPHS = {"killed": "x", "left": "v", "frozen": "s", "back": "^"}
KINDS = {
    "kill": "killed",
    "leave": "left",
    "stop": "frozen",
    "cont": "back",
    "restart": "back",
    "join": "back",
    "partition": SPAN,
}
FEW = 30  # marks of a run up to which each has a line over the whole height
GREY = "#5b6b7b"


class Mark(NamedTuple):
    """Something that has happened, for a picture.

    Attributes:
        kind: a key of `GLYPHS`, or `SPAN` for a partition.
        at: when it began, in seconds on the clock of the run.
        round: in which round, as axes count them: how many rounds were done.
        until: when a partition ended, as `at`; infinity: it did not.
        until_round: as `round`.
    """

    kind: str
    at: float
    round: float
    until: float = math.inf
    until_round: float = math.inf

    def ended(self, at: float, round: float) -> Mark:
        """Return a mark that has ended now at the latest; those of moments stay as they are."""
        lasts = self.kind == SPAN and self.until == math.inf
        return self._replace(until=at, until_round=round) if lasts else self


def recovery(metrics: Metrics, first_s: float | None) -> dict[str, Any]:
    """Return how the accuracy fell and came back after the first thing had happened.

    It is the mean over those that are there, in the rounds in which it was measured. The first
    round to be counted as harmed is the first that somebody ended later than `first_s`.

    Args:
        metrics: of the run.
        first_s: when that was, in seconds on the clock of the metrics; None: it never was.

    Returns:
        ``accuracy_before``: in the last measured round before; None: nothing was measured.
        ``accuracy_least``: the least since then.
        ``recovery_rounds``: how many rounds it took, counted from the last unharmed one, until
        the accuracy was back at `accuracy_before` less one point, after it had fallen below that
        for the first time. 0: it never fell so far; None: it never came back.
    """
    unknown = dict.fromkeys(("accuracy_before", "accuracy_least", "recovery_rounds"))
    known = np.isfinite(metrics["eval_acc"])
    rounds, place, count = np.unique(
        metrics["round"][known], return_inverse=True, return_counts=True
    )
    later = metrics["round"][metrics[clock(metrics)] > (math.inf if first_s is None else first_s)]
    if not len(later) or not (rounds < later.min()).any() or not (rounds >= later.min()).any():
        return unknown
    mean = np.bincount(place, weights=metrics["eval_acc"][known]) / count
    since = np.searchsorted(rounds, later.min())
    before, after = float(mean[since - 1]), mean[since:]
    bad = after < before - MARGIN
    took: int | None = 0
    if bad.any():
        fell = int(bad.argmax())
        good = np.flatnonzero(~bad[fell:])
        took = int(rounds[since + fell + good[0]] - later.min()) + 1 if len(good) else None
    return {
        "accuracy_before": before,
        "accuracy_least": float(after.min()),
        "recovery_rounds": took,
    }


def clock(metrics: Metrics) -> str:
    """Return the column that tells when a round has ended: virtual time, where there is any."""
    return "virtual_s" if np.isfinite(metrics["virtual_s"]).any() else "wall_s"


def churn_table(runs: Sequence[Run]) -> Table | None:
    """Return what happened in runs and what it did, a column for each; None if nothing did."""
    named = [(n, r) for n, r in zip(labels(runs), runs, strict=True) if r.summary.get("churn")]
    if not named:
        return None
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("churn: median (and longest) times", overflow="fold")
    for name, _ in named:
        table.add_column(Text(name), overflow="fold")
    for title, tell in _LINES.items():
        cells = [tell(run.summary["churn"], run) for _, run in named]
        if any(cell != UNKNOWN for cell in cells):
            table.add_row(title, *cells)
    return table


def marks(run: Run) -> list[Mark]:
    """Return what is to be marked in the pictures of a run, as far as it has come.

    Raises:
        UserError: ``events.jsonl`` is damaged.
    """
    if "churn" not in run.experiment or not (run.folder / EVENTS).is_file():
        return []
    events = _events(run)
    happened = [event for event in events if event["event"] == "churn"]
    column, began = clock(run.metrics), 0.0
    if column == "wall_s" and happened:  # scripts begin when the last of the founders trains
        earlier = events[: events.index(happened[0])]
        training = [event["wall_s"] for event in earlier if event.get("phase") == "training"]
        began = max(training, default=0.0)
    came = {node for e in happened if e["kind"] in ("join", "restart") for node in e["nodes"]}
    done, ends = _progress(run.metrics, column, came)
    found: list[Mark] = []
    for event in happened:
        at = event[column] - began
        round = event.get("round", float(np.interp(at, ends, done)))
        if event["kind"] in ("partition", "heal"):
            found = [one.ended(at, round) for one in found]
        if kind := KINDS.get(event["kind"]):
            found.append(Mark(kind, at, round))
    return found


def draw_marks(axes: Axes, found: Sequence[Mark], x: str, colour: str, lane: int) -> None:
    """Draw the marks of a run into a picture against rounds or its own clock.

    Args:
        axes: what is drawn into; its limits are kept.
        found: the marks.
        x: ``"round"``, or else the axis is in seconds.
        colour: of the run.
        lane: how many runs have their marks above these.
    """
    height = axes.get_xaxis_transform()
    _, right = axes.set_xlim(axes.get_xlim())  # which keeps them
    for mark in found:
        at, until = (mark.round, mark.until_round) if x == "round" else (mark.at, mark.until)
        if mark.kind == SPAN:
            axes.axvspan(at, min(until, right), color=colour, alpha=0.1, linewidth=0)
        if mark.kind == SPAN or at > right:  # later than the last round
            continue
        if len(found) <= FEW:
            axes.axvline(at, color=colour, linewidth=0.6, alpha=0.5)
        glyph, y = GLYPHS[mark.kind], 1 - 0.035 * lane
        look: dict[str, Any] = {"color": colour, "markersize": 4.5, "clip_on": False}
        axes.plot(at, y, glyph, transform=height, **look)


def legend_of(found: Sequence[Mark]) -> tuple[list[Artist], list[str]]:
    """Return what a legend says of marks: handles and names."""
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch

    kinds = {mark.kind for mark in found}
    names = [name for name in (*GLYPHS, SPAN) if name in kinds]
    look: dict[str, Any] = {"color": GREY, "markersize": 4.5, "linestyle": ""}
    return [
        Patch(color=GREY, alpha=0.2, linewidth=0)
        if name == SPAN
        else Line2D([], [], marker=GLYPHS[name], **look)
        for name in names
    ], names


def _events(run: Run) -> list[dict[str, Any]]:
    """Return what has happened; a last line that was not written to its end is left out."""
    path = run.folder / EVENTS
    try:
        lines = path.read_text(encoding="utf-8").split("\n")[:-1]
        return [json.loads(line) for line in lines]
    except (OSError, ValueError) as error:
        raise UserError(f"{path} cannot be read: {error}") from error


def _progress(metrics: Metrics, column: str, came: set[int]) -> tuple[list[float], list[float]]:
    """Return how many rounds were done, ascending, and when the first peer had done them.

    The clocks of real peers that came later do not show the time of the run.
    """
    others = ~np.isin(metrics["node"], list(came))
    kept = others if others.any() else np.ones_like(others)
    rounds, ends = metrics["round"][kept], metrics[column][kept]
    done = np.unique(rounds)
    first = np.full(len(done), math.inf)
    np.minimum.at(first, np.searchsorted(done, rounds), ends)
    first = np.minimum.accumulate(first[::-1])[::-1]
    return [0.0, *(done + 1.0)], [0.0, *first]


def _happened(churn: Mapping[str, Any], run: Run) -> str:
    counts = churn["happenings"].items()
    return ", ".join(f"{count}× {kind}" for kind, count in counts) or UNKNOWN


def _spread(key: str) -> Callable[[Mapping[str, Any], Run], str]:
    def told(churn: Mapping[str, Any], run: Run) -> str:
        found = churn.get(key)
        return f"{seconds(found['median'])} ({seconds(found['max'])})" if found else UNKNOWN

    return told


def _count(key: str) -> Callable[[Mapping[str, Any], Run], str]:
    return lambda churn, run: str(churn.get(key, UNKNOWN))


def _share(key: str) -> Callable[[Mapping[str, Any], Run], str]:
    return lambda churn, run: f"{100 * churn[key]:.3g} %" if key in churn else UNKNOWN


def _recovered(churn: Mapping[str, Any], run: Run) -> str:
    if churn.get("accuracy_before") is None:
        return UNKNOWN
    before, least = (f"{100 * churn[key]:.2f} %" for key in ("accuracy_before", "accuracy_least"))
    match churn["recovery_rounds"]:
        case 0:
            return f"never fell below {before} by more than {100 * MARGIN:.0f} point"
        case None:
            return f"not by the end: {before} before, then {least}"
        case rounds:
            return f"{rounds} rounds: {before} before, then {least}"


def _stall(churn: Mapping[str, Any], run: Run) -> str:
    told = _spread("stall_s")(churn, run)
    return told if told == UNKNOWN else f"{told}, survivors: {churn['survivors']}"


def _one_sided(churn: Mapping[str, Any], run: Run) -> str:
    return str(run.summary.get("one_sided", UNKNOWN))


def _membership(churn: Mapping[str, Any], run: Run) -> str:
    spent = churn.get("membership_bytes_per_s")
    return f"{size(spent)} a second" if spent else UNKNOWN


_LINES: Mapping[str, Callable[[Mapping[str, Any], Run], str]] = {
    "happened": _happened,
    "suspected by the first": _spread("first_suspected_s"),
    "suspected by all": _spread("suspected_by_all_s"),
    "dead to the first": _spread("first_dead_s"),
    "dead to all": _spread("known_dead_to_all_s"),
    "kills not noticed": _count("unnoticed_kills"),
    "leave known to all": _spread("known_left_to_all_s"),
    "return known to all": _spread("known_back_to_all_s"),
    "false suspicions": _count("false_suspicions"),
    "false deaths": _count("false_deaths"),
    "stall": _stall,
    "mixed one-sidedly": _one_sided,
    "mean moved by exchanges": _share("mean_drift"),
    "mass kept": _share("mass_kept"),
    "accuracy back after": _recovered,
    "membership, per peer": _membership,
}
"""What is told of churn, in this order."""
