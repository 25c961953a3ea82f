"""Traces: when machines were there, as somebody has recorded it.

A CSV file with the header ``node,start,end``: node is there in [start, end) seconds. A node may
have several lines; one without any is there all the time. An `end` that is empty, or the latest in
the file, is the end of the recording, not of the node.
"""

from __future__ import annotations

import csv
import math
from pathlib import Path

from p2pfl.churn.outages import How, Outage
from p2pfl.churn.reading import read_text
from p2pfl.errors import UserError

LARGEST = 1 << 26  # bytes
HEADER = ["node", "start", "end"]


def read_trace(path: Path, n: int, how: How) -> list[Outage]:
    """Return when nodes are away by a trace.

    Args:
        path: the CSV file.
        n: how many peers there are.
        how: how they go.

    Raises:
        UserError: the file is missing or no such trace; it names the line.
    """
    stays = _stays(path, n)
    over = max(
        (end for times in stays.values() for _, end, _ in times if end < math.inf), default=0
    )
    found: list[Outage] = []
    for node, times in sorted(stays.items()):
        away = 0.0
        for start, end, line in sorted(times):
            if start < away:
                raise UserError(f"{path}, line {line}: node {node} is there already at {start:g} s")
            if start > away:
                found.append(Outage(away, start, node, how))
            away = end
        if away < over:
            found.append(Outage(away, math.inf, node, how))
    return found


def _stays(path: Path, n: int) -> dict[int, list[tuple[float, float, int]]]:
    """Return for each node the start, end and line of every stay."""
    stays: dict[int, list[tuple[float, float, int]]] = {}
    rows = csv.reader(read_text(path, LARGEST).splitlines())
    if (header := [cell.strip() for cell in next(rows, [])]) != HEADER:
        raise UserError(f"{path}: the header is {','.join(header)!r}; expected 'node,start,end'")
    for line, row in enumerate(rows, 2):
        try:
            if row:
                node, start, end = _row(row, n)
                stays.setdefault(node, []).append((start, end, line))
        except ValueError as error:
            raise UserError(f"{path}, line {line}: {error}") from None
    if not stays:
        raise UserError(f"{path} holds no line of a node")
    return stays


def _row(row: list[str], n: int) -> tuple[int, float, float]:
    if len(row) != 3:
        raise ValueError(f"{len(row)} cells; expected 3: node,start,end")
    try:
        node, start, end = int(row[0]), float(row[1]), float(row[2].strip() or math.inf)
    except ValueError:
        raise ValueError(f"{','.join(row)!r} are no node and seconds") from None
    if not 0 <= node < n:
        raise ValueError(f"node {node} is unknown; there are {n}: 0 to {n - 1}")
    if not 0 <= start < end:
        raise ValueError(f"from {start:g} to {end:g} s is no time")
    return node, start, end
