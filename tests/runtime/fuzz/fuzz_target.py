"""What is fuzzed: everything that decodes what other peers send."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from threading import Condition
from unittest import mock

import zmq
from fuzz_inputs import CHUNK, RUN, SCHEMA, Do, Step, Story, message

from p2pfl.errors import RemoteProtocolError
from p2pfl.learning.pieces import parts_of
from p2pfl.peer.events import Received
from p2pfl.runtime import chunks, parts, streams, wire
from p2pfl.runtime.chunks import Outgoing
from p2pfl.runtime.flows import MOST_CREDIT, PHASES, Expected, Inflow, Outflow
from p2pfl.runtime.streams import Stream
from p2pfl.runtime.wire import Header, Kind

WINDOW = 4


@contextmanager
def small() -> Iterator[None]:
    """Make chunks so small that short inputs are models of several."""
    cached = (chunks.layout, wire.model_size)
    with ExitStack() as patched:
        patched.enter_context(mock.patch.object(wire, "CHUNK", CHUNK))
        for module in (parts, streams):
            patched.enter_context(mock.patch.object(module, "WIDE", 8))
        for each in cached:
            each.cache_clear()
        yield
    for each in cached:
        each.cache_clear()


class Peer:
    """One end of a link, as far as it decodes.

    Attributes:
        accepted: how many messages were in order.
        refused: how many were not.
    """

    def __init__(self) -> None:
        self.accepted = self.refused = 0
        self._inflows = {Do.CHUNK: Inflow(), Do.STAY: Inflow(), Do.STREAM: Inflow()}
        for do, inflow in self._inflows.items():
            news = Condition() if do is Do.STREAM else None
            inflow.expect(2, Expected(SCHEMA, WINDOW, stay=do is Do.STAY, news=news))
        self._outflow, self._round = Outflow(), 0
        self._outflow.connected(b"")
        self._asked = 0

    def play(self, story: Story) -> None:
        """Go through a story; nothing but refusals may come of it."""
        for step in story:
            try:
                self._do(step)
                self.accepted += 1
            except RemoteProtocolError:
                self.refused += 1
            self._check()

    def _do(self, step: Step) -> None:
        frames = [memoryview(bytearray(frame)) for frame in step.frames or (b"",)]
        match step.do:
            case Do.HEADER:
                header = wire.unpack(frames[0])
                assert wire.unpack(wire.pack(header)) == header
            case Do.TERMS:
                terms = wire.unpack_terms(frames[0])
                assert wire.unpack_terms(wire.pack_terms(terms)) == terms
            case Do.CHUNK | Do.STAY | Do.STREAM as do:
                self._look_at(self._inflows[do].take(wire.unpack(frames[0]), frames[1:]))
            case Do.CREDIT:
                header = wire.unpack(frames[0])
                self._outflow.asked(header)
                self._asked += header.number
            case _:
                self._change(step.do)
        while self._outflow.flush(self._hand_over):
            pass

    def _change(self, do: Do) -> None:
        """Do something that takes no frames."""
        if do is Do.SEND:
            header = Header(Kind.CHUNK, RUN, 2, 0, self._round, 1)
            self._outflow.put(Outgoing(header, message()), True)
            self._round += 1
            return
        for inflow in self._inflows.values():
            inflow.owed() if do is Do.MORE else inflow.broken()
        if do is Do.BREAK:
            self._outflow.connected(b"")
            self._asked = 0

    def _look_at(self, received: Received | None) -> None:
        """Check a model, and mix what has come of it if it is a stream."""
        for field in received.message if received else ():
            for part in () if isinstance(field, Stream) else parts_of(field):
                assert not part.is_floating_point() or part.isfinite().all()
        for stream in self._inflows[Do.STREAM]._streams:
            while stream.held:
                columns = stream.take_columns(0.0)
                assert columns is None or columns.isfinite().all()
                stream.done()

    def _hand_over(self, connection: bytes, frames: Sequence[zmq.Frame]) -> bool:
        self._asked -= 1
        assert self._asked >= 0, "a chunk that was not asked for"
        return True

    def _check(self) -> None:
        """Check that what is kept has a limit."""
        for inflow in self._inflows.values():
            assert 0 <= inflow._given <= WINDOW
            assert inflow._given + sum(one.held for one in inflow._streams) <= WINDOW
            assert len(inflow._streams) <= 2 * WINDOW
        assert len(self._outflow._credit) <= PHASES + 1
        assert all(0 <= credit <= MOST_CREDIT for credit in self._outflow._credit.values())
        assert len(self._outflow._queue) <= self._round
