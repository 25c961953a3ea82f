"""What a run leaves: a folder that is valid at every moment, also of a run that was broken off.

::

    DIR/experiment.toml            the experiment, every default spelled out; written last of
                                   what a run begins with, so where it is, all of that is
    DIR/metrics.csv                one line per node and round; empty: not measured
    DIR/events.jsonl               one JSON object per line
    DIR/models/mean.safetensors    the final models, also node-0003.safetensors and so on
    DIR/summary.json               its "status" is "running" until the run has ended
    DIR/sketch_pairs.f32           a peer's own folder: two sketches for each line, of its model
                                   and of what the exchange has changed in it; NaN: not known
    DIR/peers/003/                 the folders of peers that ran as processes
    DIR/checkpoints/               what an unfinished run goes on from
"""

from __future__ import annotations

import fcntl
import io
import itertools
import json
import math
import os
import time
import typing
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from p2pfl import __version__, files
from p2pfl.errors import RunError, UserError
from p2pfl.results.durable import Disk
from p2pfl.runtime.setup import Row, Status
from p2pfl.runtime.sketch import WIDTH

EXPERIMENT, METRICS, EVENTS = "experiment.toml", "metrics.csv", "events.jsonl"
MODELS, SUMMARY, SKETCHES, PEERS = "models", "summary.json", "sketch_pairs.f32", "peers"
CHECKPOINTS = "checkpoints"
SKETCHED = 2 * 4 * WIDTH  # bytes of sketches for each line

HEADER = ",".join(Row._fields) + "\n"  # the first line of the metrics
ROW_TYPES: Mapping[str, type] = typing.get_type_hints(Row)


class Mark(NamedTuple):
    """How far a run folder had come: bytes of its files, and seconds; at first nothing."""

    metrics: int = 0
    sketches: int = 0
    wall_s: float = 0.0


class Recorder:
    """Write a run folder.

    Args:
        folder: where; made if it is missing, and it must be empty.
        experiment_toml: the experiment as the text of a file.
        resume: go on in the folder of a run that was broken off instead. Metrics and sketches are
            cut back to this mark; events are kept.
        meta: what the summary holds from the start, as ``on="simulate", base="/home/me"``.

    Raises:
        UserError: the folder holds something already, or cannot be made; or there is no such run
            to go on with, or another process writes there.
    """

    def __init__(
        self,
        folder: Path,
        experiment_toml: str,
        resume: Mark | None = None,
        /,
        **meta: Any,  # noqa: ANN401
    ) -> None:
        self.folder, self._meta = folder, meta
        self._clock = time.perf_counter() - (resume.wall_s if resume else 0.0)
        if resume is None:
            _occupy(folder)
        self._metrics = _append(folder / METRICS)
        _lock(self._metrics, folder)
        if resume is not None:
            _cut_back(folder, resume)
        self._events = _append(folder / EVENTS)
        self._sketches: io.BufferedWriter | None = None
        if resume is None or resume.metrics == 0:
            self._metrics.write(HEADER)
        self.rows([])
        self._summarise("running", {}, None)
        with _writing(folder / EXPERIMENT):
            Disk().flush_folder(folder)
            files.replace(folder / EXPERIMENT, experiment_toml.encode())
        if resume is None:
            self.event("started")

    def rows(self, rows: Sequence[Row]) -> None:
        """Add lines to the metrics, in the order given."""
        with _writing(self.folder / METRICS):
            self._metrics.write("".join(map(_line, rows)))
            self._metrics.flush()

    def row(self, row: Row, sketches: Tensor | None) -> None:
        """Add a peer's own line and its sketches, ``[2, WIDTH]``.

        Without them, the model of this round counts as unknown.
        """
        if sketches is None:
            sketches = torch.full((2, WIDTH), math.nan)
        with _writing(self.folder / SKETCHES):
            if self._sketches is None:
                self._sketches = (self.folder / SKETCHES).open("ab")
            pair = sketches.detach().cpu().float().reshape(2, WIDTH)
            self._sketches.write(pair.numpy().tobytes())
            self._sketches.flush()
        self.rows([row])

    def mark(self) -> Mark:
        """Return how far the folder has come, when all of that is on the disk."""
        wall = time.perf_counter() - self._clock
        with _writing(self.folder):
            metrics, sketches = (_flushed(self.folder / name) for name in (METRICS, SKETCHES))
            for folder in (self.folder, self.folder.absolute().parent):
                Disk().flush_folder(folder)
        return Mark(metrics, sketches, wall)

    def event(self, kind: str, /, **fields: Any) -> None:  # noqa: ANN401
        """Note that something happened, with the seconds since the recorder was made."""
        wall = round(time.perf_counter() - self._clock, 6)
        line = json.dumps(strict({"wall_s": wall, "event": kind, **fields}), allow_nan=False)
        with _writing(self.folder / EVENTS):
            self._events.write(line + "\n")
            self._events.flush()

    def model(
        self,
        which: int | Literal["mean"],
        tensors: Mapping[str, Tensor],
        metadata: Mapping[str, str],
    ) -> None:
        """Save the model of a node, or the mean model, as `predictor.save_tensors` gives it."""
        from safetensors import SafetensorError  # not needed by runs that keep no model
        from safetensors.torch import save_file

        name = which if isinstance(which, str) else f"node-{which:04d}"
        path = self.folder / MODELS / f"{name}.safetensors"
        with _writing(path):
            path.parent.mkdir(exist_ok=True)
            with files.replacing(path) as draft:
                try:
                    save_file(dict(tensors), draft, {**metadata, "node": str(which)})
                except SafetensorError as error:  # also where the disk is full
                    raise OSError(str(error)) from error

    def finish(self, status: Status, summary: Mapping[str, Any], error: str | None = None) -> None:
        """Write the summary for good and close the files.

        Args:
            status: how the run has ended.
            summary: what `summarise` returned, and anything else worth keeping.
            error: what went wrong, in words.
        """
        self.event(status, **({"error": error} if error is not None else {}))
        self._summarise(status, summary, error)
        for file in (self._metrics, self._events, self._sketches):
            if file is not None:
                file.close()

    def _summarise(self, status: Status, summary: Mapping[str, Any], error: str | None) -> None:
        about = {"version": __version__, **self._meta, **summary, "status": status}
        if error is not None:
            about["error"] = error
        text = json.dumps(strict(about), indent=2, ensure_ascii=False, allow_nan=False)
        with _writing(self.folder / SUMMARY):
            files.replace(self.folder / SUMMARY, f"{text}\n".encode())


def new_folder(base: Path, name: str) -> Path:
    """Make and return the first of ``base/name``, ``base/name-2``, ... that is not there yet.

    Two runs started at the same moment get two folders.

    Raises:
        UserError: no folder can be made there.
    """
    for number in itertools.count(1):
        folder = base / (name if number == 1 else f"{name}-{number}")
        try:
            base.mkdir(parents=True, exist_ok=True)
            folder.mkdir()
        except FileExistsError as error:
            if base.is_dir():
                continue
            raise UserError(f"{base} is not a folder; choose another --out") from error
        except OSError as error:
            raise UserError(f"{folder} cannot be made: {error.strerror or error}") from error
        return folder
    raise AssertionError("unreachable")


def check_idle(folder: Path) -> None:
    """Refuse a run folder, or one of its peers', that a process is writing to.

    Raises:
        UserError: it names the folder.
    """
    for path in folder.rglob(METRICS):
        with path.open(encoding="utf-8") as file:
            _lock(file, path.parent)


def _line(row: Row) -> str:
    return ",".join(map(_cell, row, ROW_TYPES.values())) + "\n"


def _cell(value: float, kind: type) -> str:
    if kind is int:
        return str(int(value))
    return "" if math.isnan(value) else repr(float(value))


def strict(value: Any) -> Any:  # noqa: ANN401 - whatever JSON can hold
    """Return a value as strict JSON can hold it: a number that is not finite becomes null."""
    if isinstance(value, Mapping):
        return {str(key): strict(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [strict(part) for part in value]
    if isinstance(value, np.ndarray | np.generic | Tensor):
        return strict(value.tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return str(value) if isinstance(value, Path) else value


def _occupy(folder: Path) -> None:
    """Make the folder and a first file in it, if nobody else has."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if any(folder.iterdir()):
            raise FileExistsError
        (folder / METRICS).open("x").close()
    except FileExistsError as error:
        what = "holds files already" if folder.is_dir() else "is not a folder"
        raise UserError(f"{folder} {what}; choose another --out") from error
    except OSError as error:
        raise UserError(f"{folder} cannot be written: {error.strerror or error}") from error


def _append(path: Path) -> io.TextIOWrapper:
    with _writing(path):
        return path.open("a", encoding="utf-8", newline="\n")


def _flushed(path: Path) -> int:
    """Return how long a file is, when all of it is on the disk; 0 if there is none."""
    if not path.is_file():
        return 0
    with path.open("rb") as file:
        os.fsync(file.fileno())
        return file.seek(0, io.SEEK_END)


def _lock(file: io.TextIOBase, folder: Path) -> None:
    """Keep others from going on with this run; when the process ends, however, they may."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise UserError(f"{folder} is being written by another process") from error
    except OSError:  # some network file systems have no locks
        pass


def _cut_back(folder: Path, mark: Mark) -> None:
    """Cut the files of a run back to where they were."""
    _fill_up(folder / SKETCHES, mark.sketches)
    events = (folder / EVENTS).read_bytes() if (folder / EVENTS).is_file() else b""
    whole = events.rfind(b"\n") + 1  # a last line may be unfinished
    for name, size in ((METRICS, mark.metrics), (SKETCHES, mark.sketches), (EVENTS, whole)):
        path = folder / name
        found = path.stat().st_size if path.is_file() else 0
        if found < size:
            raise UserError(f"{path} has {found} bytes, but had {size} at the last checkpoint")
        if found > size:
            with _writing(path):
                os.truncate(path, size)


def _fill_up(path: Path, size: int) -> None:
    """Let sketches that a power cut has lost, and not their lines, count as unknown."""
    found = path.stat().st_size if path.is_file() else 0
    if found < size:
        whole = found // SKETCHED
        unknown = np.full((size // SKETCHED - whole, 2, WIDTH), math.nan, dtype="<f4")
        with _writing(path), path.open("ab") as file:
            file.truncate(whole * SKETCHED)
            file.write(unknown.tobytes())


@contextmanager
def _writing(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunError(f"{path} cannot be written: {error.strerror or error}") from error
