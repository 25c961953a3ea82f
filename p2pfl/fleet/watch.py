"""Follow the peers of a launch to their end, whatever happens to the connections."""

from __future__ import annotations

import asyncio
import json
import math
import time
from collections.abc import Mapping
from typing import Any, Literal, Protocol

from p2pfl.fleet.record import Ending, Place, Record
from p2pfl.fleet.remote import GRACE
from p2pfl.fleet.ssh import HostError, Shell
from p2pfl.runtime.setup import Row

OnFailure = Literal["stop", "go-on"]

RETRY = 2.0  # seconds before another try to connect
GIVE_UP = 3 * GRACE  # seconds that a host may be out of reach once all are to end


class View(Protocol):
    """Who is shown how it goes on."""

    def rows(self, rows: list[Row], /) -> None:
        """Take note of peers that have ended a round."""

    def phase(self, node: int, phase: str, /) -> None:
        """Take note of what a peer is doing."""

    def note(self, text: str, /) -> None:
        """Take note of anything else."""


class Watching:
    """Follows all peers.

    Args:
        record: the launch.
        shells: a connection to each host, by name; a lost one is replaced.
        view: shown what happens.
        on_failure: whether the others are stopped when one fails.
        detach: set it to leave the peers alone.

    Attributes:
        endings: how the peers have ended that have.
        interrupted: whether the user wanted it, here or elsewhere.
    """

    def __init__(
        self,
        record: Record,
        shells: dict[str, Shell],
        view: View,
        on_failure: OnFailure,
        detach: asyncio.Event,
    ) -> None:
        self.record, self.shells, self.view, self.on_failure = record, shells, view, on_failure
        self._detach = detach
        self.endings: dict[int, Ending] = {}
        self.interrupted = False
        self._stop = asyncio.Event()
        self._stopped = math.inf  # when (monotonic) all were to end
        self._away: dict[str, float] = {}  # hosts out of reach, and since when
        self._at: dict[int, int] = {}  # how many bytes each peer has said

    async def until_the_end(self) -> bool:
        """Return whether all peers have ended; if not, we are to leave them alone."""
        everybody = asyncio.create_task(self._follow_all())
        stopper = asyncio.create_task(self._stop_all())
        leaving = asyncio.create_task(self._leave())
        try:
            await asyncio.wait({everybody, leaving}, return_when=asyncio.FIRST_COMPLETED)
            if everybody.done():
                everybody.result()
            return everybody.done()
        finally:
            for task in (everybody, stopper, leaving):
                task.cancel()
            await asyncio.gather(everybody, stopper, leaving, return_exceptions=True)

    def interrupt(self) -> None:
        """End all peers, because the user wants it."""
        self.interrupted = True
        self._end()
        self.view.note("stopping all peers ...")

    def lost(self, place: Place, why: str) -> None:
        """Take those peers of a host for failed whose end is not known."""
        for node in self._left(place):
            self._ended(node, {"status": "failed", "why": why})

    async def _leave(self) -> None:
        await self._detach.wait()

    async def _follow_all(self) -> None:
        await asyncio.gather(*map(self._follow, self.record.places))

    async def _follow(self, place: Place) -> None:
        """Follow the peers of a host; the connection may be lost and come back."""
        name = place.host.name
        while self._left(place):
            try:
                await self._listen(place)
            except HostError as error:
                if shell := self.shells.pop(name, None):
                    shell.close()
                if name not in self._away:
                    self._away[name] = time.monotonic()
                    self.view.note(f"{error}; its peers go on without us, trying again")
                if time.monotonic() > max(self._away[name], self._stopped) + GIVE_UP:
                    self.lost(place, "its host is out of reach, and it may still go on")
                await asyncio.sleep(RETRY)

    async def _listen(self, place: Place) -> None:
        name = place.host.name
        if name not in self.shells:
            self.shells[name] = await Shell.connect(place.host)
        at = {node: self._at.get(node, 0) for node in self._left(place)}
        async for news in self.shells[name].news(place.folder, at):
            if self._away.pop(name, None) is not None:
                self.view.note(f"{name}: connected again")
            self._hear(news)
        if self._left(place):
            raise HostError(f"{name}: the connection is lost")

    def _end(self) -> None:
        self._stopped = min(self._stopped, time.monotonic())
        self._stop.set()

    async def _stop_all(self) -> None:
        await self._stop.wait()
        await asyncio.gather(*map(self._stop_on, self.record.places))

    async def _stop_on(self, place: Place) -> None:
        """Stop the peers of a host, as soon as there is a connection to it."""
        while left := self._left(place):
            if shell := self.shells.get(place.host.name):
                try:
                    await shell.ask("stop", folder=place.folder, nodes=left)
                    return
                except HostError:  # who follows it connects again
                    pass
            await asyncio.sleep(RETRY)

    def _left(self, place: Place) -> list[int]:
        return [node for node in place.nodes if node not in self.endings]

    def _hear(self, news: Mapping[str, Any]) -> None:
        if "line" in news:
            self._at[news["node"]] = news["at"]
            said = said_by_peer(news["line"])
            if "row" in said:
                self.view.rows([_row(said["row"])])
            elif "phase" in said:
                self.view.phase(news["node"], said["phase"])
        elif "ended" in news:
            self._ended(news["node"], news["ended"])

    def _ended(self, node: int, ending: Ending) -> None:
        self.endings[node] = ending
        self.view.phase(node, ending["status"])
        if self._stop.is_set() or ending["status"] == "finished":
            return
        how = f"failed: {ending['why']}"
        if ending["status"] == "interrupted":  # as by `p2pfl down`
            self.interrupted, how = True, "was asked to end by somebody else"
        what = "stopping the others" if self.on_failure == "stop" else "the others go on"
        self.view.note(f"peer {node} on {self.record.hosts[node]} {how}; {what}")
        if self.on_failure == "stop":
            self._end()


def said_by_peer(line: str) -> dict[str, Any]:
    """Return what a peer's line of JSON says, ``{}`` if it is none: a model may print as well."""
    try:
        said = json.loads(line)
    except ValueError:
        return {}
    return said if isinstance(said, dict) else {}


def _row(numbers: Mapping[str, float | None]) -> Row:
    """Return the row of a peer; a number that is not known is null in JSON."""
    return Row._make(math.nan if (v := numbers.get(key)) is None else v for key in Row._fields)
