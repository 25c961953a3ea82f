"""What the decoders are fed in fuzzing: short stories of messages, and how they lie in a file.

python tests/runtime/fuzz/fuzz_inputs.py    # writes the corpus anew
"""

from __future__ import annotations

from enum import IntEnum
from pathlib import Path
from typing import NamedTuple

import msgpack
import torch

from p2pfl.runtime import wire
from p2pfl.runtime.chunks import Outgoing, checksum, schema
from p2pfl.runtime.wire import Header, Kind

CORPUS = Path(__file__).parent / "corpus"
MOST_STEPS, MOST_FRAMES, MOST_BYTES = 24, 6, 1 << 16
RUN = b"12345678"
CHUNK = 32  # bytes: the models of these stories are two chunks and a bit


class Message(NamedTuple):
    values: torch.Tensor
    columns: torch.Tensor
    weight: torch.Tensor


class Do(IntEnum):
    """What is done in a step, with the frames it has."""

    HEADER = 0
    TERMS = 1
    CHUNK = 2  # of a model that is put together
    STREAM = 3  # of a model that is mixed as it comes
    CREDIT = 4
    BREAK = 5  # the connection
    MORE = 6  # credit is given
    SEND = 7  # a model of ours
    STAY = 8  # a chunk of a model that stays where it came


class Step(NamedTuple):
    do: Do
    frames: tuple[bytes, ...] = ()


Story = list[Step]


def encode(story: Story) -> bytes:
    """Return a story as it lies in a file."""
    data = bytearray()
    for do, frames in story:
        data += bytes([do, len(frames)])
        for frame in frames:
            data += len(frame).to_bytes(2, "big") + frame
    return bytes(data)


def decode(data: bytes) -> Story:
    """Return the story in a file; anything at all is one."""
    story: Story = []
    at = 0
    while at + 1 < len(data) and len(story) < MOST_STEPS:
        do, count = Do(data[at] % len(Do)), data[at + 1] % (MOST_FRAMES + 1)
        at += 2
        frames = []
        for _ in range(count):
            size = int.from_bytes(data[at : at + 2], "big")
            frames.append(data[at + 2 : at + 2 + size])
            at += 2 + size
        story.append(Step(do, tuple(frames)))
    return story


def message() -> Message:
    values = torch.arange(1.0, 13.0).reshape(1, 12)
    columns = torch.arange(3, dtype=torch.int32).reshape(1, 3)
    return Message(values, columns, torch.ones(1, 1, dtype=torch.float64))


SCHEMA = schema(message())


def model(round: int, do: Do = Do.CHUNK, sent: Message | None = None) -> Story:
    header = Header(Kind.CHUNK, RUN, 2, 1, round, 2, 0.5)
    outgoing = Outgoing(header, sent or message())
    each = (outgoing.chunk(index) for index in range(len(outgoing)))
    return [Step(do, tuple(bytes(frame) for frame in frames)) for frames in each]


def credit(number: int, next: int = 0, phase: int = 2) -> Step:
    header = Header(Kind.CREDIT, RUN, phase, 1, next, number=number)
    return Step(Do.CREDIT, (wire.pack(header),))


def sealed(frames: tuple[bytes, ...]) -> tuple[bytes, ...]:
    """Return a chunk with the checksum that belongs to it, if its header is one."""
    try:
        header = wire.unpack(frames[0])
    except wire.RemoteProtocolError:
        return frames
    check = checksum(header, frames[1:])
    return (wire.pack(header._replace(check=check)), *frames[1:])


def stories() -> dict[str, Story]:
    """Return the corpus: what honest peers say, and what has been or could be tried."""
    more, cut = Step(Do.MORE), Step(Do.BREAK)
    headers = [Header(kind, RUN, 2, 1, 7, 2, 0.5, 3) for kind in Kind]
    terms = wire.pack_terms({"seed": "1", "algorithm.name": "choco", "long": "x" * 150})
    bad = message()
    bad.values[0, 5] = torch.nan
    first, second, third = model(0)
    huge = Header(Kind.CHUNK, RUN, 2, 1, 2**53 - 1)
    return {
        "headers": [Step(Do.HEADER, (wire.pack(header),)) for header in headers],
        "terms": [Step(Do.TERMS, (terms,))],
        "model": [more, first, second, third],
        "models": [more, *model(0), more, *model(1), more, *model(5)],
        "staying": [more, *model(0, Do.STAY), more, *model(1, Do.STAY)],
        "broken-staying": [more, *model(0, Do.STAY)[:2], cut, more, *model(0, Do.STAY)],
        "streams": [more, *model(0, Do.STREAM), more, *model(1, Do.STREAM)],
        "broken": [more, first, cut, more, first, second, third],
        "broken-stream": [more, *model(0, Do.STREAM)[:2], cut, more, *model(1, Do.STREAM)],
        "credit": [Step(Do.SEND), credit(2), credit(3), Step(Do.SEND), cut, credit(3, next=1)],
        "other-version": [Step(Do.HEADER, (msgpack.packb([9, "a new", "layout"]),))],
        "nested": [Step(Do.TERMS, (b"\xdc\xff\xff" * 20_000,))],
        "promises": [
            Step(do, (kind + b"\xff\xff\xff\xff",))
            for do in (Do.HEADER, Do.TERMS)
            for kind in (b"\xdd", b"\xdf", b"\xdb", b"\xc6", b"\xc9")
        ],
        "unasked": [first, second],
        "out-of-order": [more, second, first, third, first],
        "twice": [more, *model(0), more, *model(0)],
        "not-finite": [more, *model(0, sent=bad), more, *model(1)],
        "not-finite-staying": [more, *model(0, Do.STAY, bad), more, *model(1, Do.STAY)],
        "not-finite-stream": [more, *model(0, Do.STREAM, bad), more, *model(1, Do.STREAM)],
        "far-ahead": [
            more,
            *(Step(Do.CHUNK, sealed((wire.pack(huge), *first.frames[1:]))) for _ in range(2)),
            *model(0),
        ],
        "wrong-sizes": [more, Step(Do.CHUNK, sealed((*first.frames[:-1], b"short")))],
        "too-much-credit": [Step(Do.SEND), credit(16), credit(1), credit(2**53 - 1)],
        "many-phases": [credit(1, phase=phase) for phase in range(20)],
    }


def main() -> None:
    wire.CHUNK = CHUNK
    for name, story in stories().items():
        (CORPUS / name).write_bytes(encode(story))


if __name__ == "__main__":
    main()
