"""Sketches that peers leave of their models, and of what exchanges have changed in them."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from p2pfl.results.record import PEERS, SKETCHED, SKETCHES
from p2pfl.runtime.sketch import WIDTH, distances


def models_of(peer: Path, rows: int) -> Tensor:
    """Return the sketches of a peer's models, ``[rows, WIDTH]``, NaN for those that are missing."""
    found = _sketches(peer / SKETCHES)[:rows, 0]
    missing = torch.full((rows - len(found), WIDTH), math.nan)
    return torch.cat([found, missing])


def far_apart(sketches: Tensor, alone: bool) -> list[float]:
    """Return the squared distance of each model from the mean model; NaN: unknown.

    Args:
        sketches: of the models, ``[rows, WIDTH]``; NaN: unknown.
        alone: whether one that stands alone is its own mean.
    """
    known = sketches.isfinite().all(1)
    far = torch.full((len(sketches),), math.nan, dtype=torch.float64)
    if alone or int(known.sum()) > 1:
        far[known] = distances(sketches[known].double())
    result: list[float] = far.tolist()
    return result


def moved(folder: Path) -> Tensor | None:
    """Return the sketch of all that exchanges have changed in the models of peers, ``[WIDTH]``.

    What a peer has written counts, whether it has lived to the end or not. None: none has.
    """
    total: Tensor | None = None
    for file in sorted((folder / PEERS).glob(f"*/{SKETCHES}")):
        rows = _sketches(file)[:, 1].double()
        known = rows[rows.isfinite().all(1)]
        if len(known):
            total = known.sum(0) + (0 if total is None else total)
    return total


def _sketches(path: Path) -> Tensor:
    """Return what a peer has written, ``[rows, 2, WIDTH]``; a last one may be unfinished."""
    data = path.read_bytes() if path.is_file() else b""
    found = np.frombuffer(data, dtype="<f4", count=len(data) // SKETCHED * 2 * WIDTH)
    return torch.from_numpy(found.reshape(-1, 2, WIDTH).copy())
