"""Somebody on the way between two peers: what can be read there, and what comes of changing it."""

from __future__ import annotations

import struct
from contextlib import suppress

import pytest
import torch
from hostile_cases import ROUNDS, SOON, VALUE, Peers, Told, constant
from links_cases import Relay

from p2pfl.runtime import sockets

PATTERN = struct.pack("<2d", VALUE, VALUE)  # two parameters, as they lie in memory
SIZE = 20_000  # parameters: a model is one chunk of 160 kB
IN_A_MODEL = 1_000_000  # a byte somewhere in the seventh: before it come a few small messages


class Tap(Relay):
    """Keeps all that is sent to who has dialled, and turns over one bit of it if told to."""

    def __init__(self, target: int, turned: int | None = None) -> None:
        self.seen, self.turned = bytearray(), turned
        super().__init__(target)

    def change(self, data: bytes) -> bytes:
        before = len(self.seen)
        self.seen += data
        if self.turned is None or not before <= self.turned < len(self.seen):
            return data
        changed = bytearray(data)
        changed[self.turned - before] ^= 8
        self.turned = None
        return bytes(changed)

    def _accept(self) -> None:
        with suppress(ConnectionRefusedError):  # the run is over
            super()._accept()

    def _pass_on(self, sock) -> None:
        if sock not in self.pairs:
            return
        data = b""
        with suppress(OSError):  # one of them has broken the connection
            data = sock.recv(65536)
            self.pairs[sock].sendall(self.change(data) if sock in self.dialled else data)
        if not data:
            self.pairs.pop(self.pairs.pop(sock)).close()
            sock.close()


def run(keyed: bool, turned: int | None = None) -> tuple[list[Told], list[Tap]]:
    """Let two peers train, each of which reaches the other through a tap."""
    peers = Peers(constant(2, d=SIZE, patience=SOON), keyed)
    taps = [Tap(port, turned) for port in peers.ports]
    peers.reached = [tap.address for tap in taps]
    try:
        with peers.running(range(2)) as both:
            ends = [peer.result(SOON) for peer in both]
    finally:
        for tap in taps:
            tap.close()
    for end in ends:
        params = end.ending.params
        torch.testing.assert_close(params, torch.full_like(params, VALUE), rtol=1e-12, atol=0.0)
        assert (end.ending.reason, end.rounds) == ("all rounds done", ROUNDS)
    return ends, taps


@pytest.mark.parametrize("keyed", [True, False], ids=["with keys", "in clear"])
def test_models_can_be_read_on_the_way_without_keys_only(keyed: bool):
    ends, taps = run(keyed)
    for end, tap in zip(ends, taps, strict=True):
        assert end.rejections == {}
        assert len(tap.seen) > ROUNDS * SIZE * 8
        assert (PATTERN in tap.seen) is not keyed


def test_a_bit_turned_in_an_encrypted_link_breaks_it_and_it_is_made_again():
    ends, taps = run(True, IN_A_MODEL)
    for end, tap in zip(ends, taps, strict=True):
        assert tap.turned is None
        assert tap.made >= 2
        assert end.ending.missed == 0
        assert end.received > ROUNDS * SIZE * 8  # nobody was given up


def test_a_bit_turned_in_clear_is_caught_by_the_checksum(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sockets, "is_direct", lambda address: False)
    ends, taps = run(False, IN_A_MODEL)
    for me, (end, tap) in enumerate(zip(ends, taps, strict=True)):
        assert tap.turned is None
        why = f"peer {1 - me}: a chunk that was damaged on its way"
        assert end.rejections == {why: 1}
        assert end.ending.missed == 0
