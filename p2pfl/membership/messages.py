"""What members say to each other, one small frame each.

    message = [kind, number, target, incarnation, round, address, claims]
    claim   = [peer, status, incarnation, round, address, by]

`incarnation`, `round` and `address` are the sender's own: every message says that its
sender is alive. Whoever sends is known by other means (the link has proved it).
"""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any, NamedTuple

import msgpack

from p2pfl.errors import RemoteProtocolError
from p2pfl.membership.members import (
    MOST_ADDRESS,
    MOST_ID,
    MOST_INCARNATION,
    MOST_ROUND,
    Claim,
    Status,
)

MOST_BYTES = 32 << 10
MOST_NUMBER = 2**53
RIDING = 8  # claims that ride on a message
IN_EXCHANGE = 128  # claims in a message of an exchange: with the longest addresses it just fits
# Without limits of its own, msgpack allocates thousands of times what it has been sent.
_LIMITS: dict[str, Any] = {
    "max_str_len": MOST_ADDRESS,
    "max_bin_len": 0,
    "max_array_len": IN_EXCHANGE,
    "max_map_len": 0,
    "max_ext_len": 0,
}


class Kind(IntEnum):
    """What a message is."""

    PING = 1  # asks for an ACK with the same number
    ACK = 2
    PREQ = 3  # asks to ping `target`, and to pass its ACK on
    NACK = 4  # `target` has not answered, but we have
    GOSSIP = 5
    EXCHANGE = 6  # all we know, or part of it; number 1 asks for the same in return


class Message(NamedTuple):
    """A message, whoever sent it.

    Attributes:
        kind: what it is.
        number: of a PING, and of what answers it, counted by whoever began; see EXCHANGE.
        target: whom a PREQ, NACK or ACK is about, else 0.
        incarnation: the sender's.
        round: how far the sender is.
        address: where it listens; empty if it does not say.
        claims: what it says of others, or of itself if that is not that it is alive.
    """

    kind: Kind
    number: int
    target: int
    incarnation: int
    round: int
    address: str
    claims: tuple[Claim, ...]


def encode(message: Message) -> bytes:
    """Return a message as it travels."""
    body: bytes = msgpack.packb(message)
    return body


def decode(body: bytes | memoryview, n: int = MOST_ID + 1) -> Message:
    """Return the message in a frame.

    Args:
        body: the frame.
        n: all ids are below.

    Raises:
        RemoteProtocolError: there is none, or it breaks a limit.
    """
    if len(body) > MOST_BYTES:
        raise RemoteProtocolError(f"a message of {len(body)} bytes about members")
    try:
        values = msgpack.unpackb(body, **_LIMITS)
    except (ValueError, msgpack.exceptions.UnpackException) as error:
        raise RemoteProtocolError("not a message about members") from error
    if not (_is_list(values, 7) and type(values[6]) is list):
        raise RemoteProtocolError("not a message about members")
    kind, number, target, incarnation, round, address, claims = values
    _check_number(kind, Kind.PING, Kind.EXCHANGE)
    _check_number(number, 0, MOST_NUMBER)
    _check_number(target, 0, n - 1)
    _check_member(incarnation, round, address)
    if kind != Kind.EXCHANGE and len(claims) > RIDING:
        raise RemoteProtocolError(f"{len(claims)} claims in one message")
    told = tuple(_claim(one, n) for one in claims)
    return Message(Kind(kind), number, target, incarnation, round, address, told)


def _claim(values: object, n: int) -> Claim:
    if not (isinstance(values, list) and _is_list(values, 6)):
        raise RemoteProtocolError("a malformed claim")
    peer, status, incarnation, round, address, by = values
    _check_number(status, Status.ALIVE, Status.LEFT)
    _check_number(peer, 0, n - 1)
    _check_number(by, 0, n - 1)
    _check_member(incarnation, round, address)
    return Claim(peer, Status(status), incarnation, round, address, by)


def _is_list(values: object, length: int) -> bool:
    return type(values) is list and len(values) == length


def _check_member(incarnation: object, round: object, address: object) -> None:
    _check_number(incarnation, 0, MOST_INCARNATION)
    _check_number(round, 0, MOST_ROUND)
    if type(address) is not str:
        raise RemoteProtocolError("an address that is no text")


def _check_number(value: object, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        raise RemoteProtocolError("a number out of range in a message about members")


def parts(claims: Sequence[Claim]) -> list[tuple[Claim, ...]]:
    """Return claims shared out among messages of an exchange, at least one."""
    starts = range(0, max(1, len(claims)), IN_EXCHANGE)
    return [tuple(claims[start : start + IN_EXCHANGE]) for start in starts]
