"""What is done on a host itself: ``python -m p2pfl.fleet.remote VERB``, JSON in and JSON out.

Only `look` imports more than the standard library, so the others answer at once and weigh little
beside training.
A run folder holds, for peer 3::

    003/          the peer's own run folder
    003.jsonl     what it says, a JSON object a line
    003.log       what goes wrong, in words
    003.pid       its process, and when that started: a number alone may be used again
    003.stop      only where it was asked to end, started or not: how it took that
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from p2pfl.fleet.look import look, path
from p2pfl.launch import cores

GRACE = 10.0  # seconds a peer has to end by itself before it is killed
POLL = 0.1  # seconds between two looks at a file
BEAT = 2.0  # seconds without news after which we say that we are there
PIECE = 1 << 16  # bytes of a file that are read at a time; no line of a peer is that long


def make(workdir: str, name: str) -> dict[str, Any]:
    """Make a new run folder that nobody else can read."""
    for number in itertools.count(1):
        folder = path(workdir) / (name if number == 1 else f"{name}-{number}")
        try:
            folder.mkdir(0o700, parents=True)
        except FileExistsError:
            if not folder.is_dir():
                raise
            continue
        return {"folder": str(folder.resolve())}
    raise AssertionError("unreachable")


def start(folder: str, peers: list[dict[str, Any]]) -> dict[str, Any]:
    """Start peers in sessions of their own, so that they outlive whoever has started them.

    Where one cannot be started, none is left running.
    """
    fair = cores.threads_each(len(peers))
    try:
        for peer, own in zip(peers, cores.deal(len(peers)), strict=True):
            # Who is to have another number of threads is to have what cores they find.
            with cores.bound(cores.usable() if peer["threads"] else own):
                _start(Path(folder, f"{peer['node']:03d}"), _command(peer, fair))
    except OSError:
        stop(folder, [peer["node"] for peer in peers])
        raise
    return {}


def follow(folder: str, at: dict[str, int], wait: bool, log: bool = False) -> None:
    """Print what peers say from these places in their files on, and how each has ended.

    Args:
        folder: the run folder.
        at: for each peer, how many bytes of what it has said are known.
        wait: go on until all have ended, or until nobody listens.
        log: print what goes wrong as well.
    """
    tails = {int(node): Tail(Path(folder, f"{int(node):03d}"), at[node], log) for node in at}
    heard = time.monotonic()
    while tails:
        for node, tail in list(tails.items()):
            alive = pid(tail.place) is not None  # asked first, so that its last words are read
            for news in tail.read():
                _say({"node": node, **news})
                heard = time.monotonic()
            if not alive:
                _say({"node": node, "ended": ending(tail.place)})
            if not (alive and wait):
                del tails[node]
        if time.monotonic() > heard + BEAT:
            heard = time.monotonic()
            _say({})
        if tails:
            time.sleep(POLL)  # nothing tells that a file has grown


class Tail:
    """What a peer adds to its files from a place on."""

    def __init__(self, place: Path, at: int, log: bool) -> None:
        self.place = place
        self._at, self._log_at, self._log = at, 0, log

    def read(self) -> Iterator[dict[str, Any]]:
        """Yield what is new: its lines, and if wanted those of its log."""
        for line, at in _lines(self.place.with_suffix(".jsonl"), self._at):
            self._at = at
            yield {"at": at, "line": line}
        if self._log:
            for line, at in _lines(self.place.with_suffix(".log"), self._log_at):
                self._log_at = at
                yield {"log": line}


def status(folder: str, nodes: list[int]) -> dict[str, Any]:
    """Say of each peer what it does, or how it has ended, and how old its last news is."""
    found = []
    for node in nodes:
        place = Path(folder, f"{node:03d}")
        alive = pid(place) is not None
        said = place.with_suffix(".jsonl")
        told: dict[str, Any] = {"node": node, "phase": "starting", "round": 0}
        with contextlib.suppress(FileNotFoundError):
            told["age"] = max(0.0, time.time() - said.stat().st_mtime)
            for line, _ in _lines(said, max(0, said.stat().st_size - PIECE)):
                told |= _phase(line)
        found.append(told if alive else told | {"ended": ending(place)})
    return {"peers": found}


def stop(folder: str, nodes: list[int], grace: float = GRACE) -> dict[str, Any]:
    """Ask peers to end, and kill those that have not after some seconds.

    One that was not started yet is not started any more.
    """
    places = [Path(folder, f"{node:03d}") for node in nodes]
    for place in places:
        _note_stop(place, "it was asked to end", also_before=True)
        _signal(place, signal.SIGTERM)
        _signal(place, signal.SIGCONT)  # a stopped process cannot hear
    deadline = time.monotonic() + grace
    while any(map(pid, places)) and time.monotonic() < deadline:
        time.sleep(POLL)  # they are nobody's children here, so there is nothing to wait on
    killed = [node for node, place in zip(nodes, places, strict=True) if pid(place)]
    for place in places:
        _note_stop(place, "it was asked to end, did not, and was killed")
        _signal(place, signal.SIGKILL)
    return {"killed": killed}


def pid(place: Path) -> int | None:
    """Return a peer's process id, or None if it has ended."""
    try:
        number, started = map(int, place.with_suffix(".pid").read_text().split())
        state, since = _process(number)
    except (OSError, ValueError):
        return None
    return number if since == started and state not in "ZX" else None


def ending(place: Path) -> dict[str, str]:
    """Say how a peer that is there no more has ended: its status, and why."""
    try:
        summary = json.loads((place / "summary.json").read_text())
        if summary["status"] != "running":
            why = summary.get("error") or summary.get("reason") or ""
            return {"status": str(summary["status"]), "why": str(why)}
    except (OSError, ValueError, KeyError):
        pass
    lines = [line for line, _ in _lines(place.with_suffix(".log"), 0) if line.strip()]
    last = lines[-1] if lines else ""
    if last.startswith("p2pfl: "):
        return {"status": "failed", "why": last.removeprefix("p2pfl: ")}
    with contextlib.suppress(OSError):  # it may have ended before it could say how
        return {"status": "interrupted", "why": place.with_suffix(".stop").read_text()}
    more = f"; its log ends with: {last}" if last else ""
    return {"status": "failed", "why": f"it was killed or broke down{more}"}


def _start(place: Path, command: list[str]) -> None:
    if place.with_suffix(".stop").exists():
        return
    with (
        place.with_suffix(".jsonl").open("wb") as out,
        place.with_suffix(".log").open("wb") as err,
    ):
        process = subprocess.Popen(
            command,
            cwd=place.parent,
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
            start_new_session=True,
        )
    try:
        _, started = _process(process.pid)
        place.with_suffix(".pid").write_text(f"{process.pid} {started}\n")
    except OSError:  # without this file nobody would ever find it
        process.kill()
        raise
    if place.with_suffix(".stop").exists():  # written by one who did not find that file yet
        process.terminate()


def _command(peer: dict[str, Any], fair: int) -> list[str]:
    words = [sys.executable, "-m", "p2pfl", "peer", "experiment.toml", "--format", "json"]
    words += ["--id", str(peer["node"]), "--peers", "peers.toml", "--out", f"{peer['node']:03d}"]
    words += ["--device", peer["device"], "--threads", str(peer["threads"] or fair)]
    for option in ("data", "keys"):
        if peer[option]:
            words += [f"--{option}", str(path(peer[option]))]
    return [*words, "--insecure"] if peer["insecure"] else words


def _note_stop(place: Path, why: str, also_before: bool = False) -> None:
    before = also_before and not place.with_suffix(".pid").exists()
    if before or pid(place) is not None:
        with contextlib.suppress(OSError):  # a full disk is no reason not to stop it
            place.with_suffix(".stop").write_text(why)


def _process(number: int) -> tuple[str, int]:
    """Return the state of a process and when it started, in clock ticks since the machine did."""
    fields = Path(f"/proc/{number}/stat").read_text().rpartition(")")[2].split()
    return fields[0], int(fields[19])


def _signal(place: Path, number: signal.Signals) -> None:
    if (process := pid(place)) is not None:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process, number)


def _lines(path: Path, at: int) -> Iterator[tuple[str, int]]:
    """Yield the whole lines of a file from a place on, each with the place where it ends."""
    try:
        file = path.open("rb")
    except FileNotFoundError:
        return
    with file:
        file.seek(at)
        while (line := file.readline(PIECE)).endswith(b"\n") or len(line) == PIECE:
            at += len(line)
            yield line.decode(errors="replace").rstrip("\n"), at


def _phase(line: str) -> dict[str, Any]:
    try:
        news = json.loads(line)
        if "row" in news:
            return {"phase": "training", "round": news["row"]["round"] + 1}
        return {"phase": str(news["phase"])} if "phase" in news else {}
    except (ValueError, TypeError, KeyError):  # the user's model may print as well
        return {}


def _say(news: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(news) + "\n")
    sys.stdout.flush()


VERBS: dict[str, Callable[..., dict[str, Any] | None]] = {
    "look": look,
    "make": make,
    "start": start,
    "follow": follow,
    "status": status,
    "stop": stop,
}


def main() -> None:
    """Do what the command line and standard input say; what goes wrong is one line."""
    asked = json.loads(sys.stdin.readline())
    try:
        answer = VERBS[sys.argv[1]](**asked)
    except BrokenPipeError:  # nobody listens any more
        os._exit(1)
    except OSError as error:
        sys.exit(f"{error.filename or 'error'}: {error.strerror or error}")
    if answer is not None:
        _say(answer)


if __name__ == "__main__":
    main()
