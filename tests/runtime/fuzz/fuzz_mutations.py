"""Mutations that know what a message is: most of what they make is nearly right."""

from __future__ import annotations

import math
from random import Random

import msgpack
from fuzz_inputs import MOST_FRAMES, MOST_STEPS, Do, Step, Story, sealed

NUMBERS = [0, 1, 2, 3, 7, 8, 9, 15, 16, 17, 31, 127, 128, 255, 256, 2**16, 2**31, 2**32]
NUMBERS += [2**53 - 1, 2**53, 2**63, 2**64 - 1, -1]
OTHERS = [True, None, 1.0, math.nan, math.inf, -0.0, "x", "", b"", b"12345678", [], [[]], {}]
TYPES = b"\x80\x90\xa0\xc0\xc1\xc4\xc7\xca\xcb\xcf\xd3\xd9\xdc\xdd\xde\xdf\xff"


def mutated(story: Story, draw: Random, others: list[Story]) -> Story:
    """Return a story with a few changes; `others` are what it can borrow from."""
    story = list(story)
    for _ in range(draw.randint(1, 3)):
        kind = draw.random()
        if kind < 0.3 or not story:
            _change_plot(story, draw, others)
            continue
        at = draw.randrange(len(story))
        do, frames = story[at]
        if kind < 0.65:
            frames = _change_header(frames, draw)
        elif kind < 0.9:
            frames = _change_bytes(frames, draw)
        else:
            frames = _change_frames(frames, draw)
        if do in (Do.CHUNK, Do.STREAM) and frames and draw.random() < 0.6:
            frames = sealed(frames)
        story[at] = Step(do, frames)
    return story[:MOST_STEPS]


def _change_plot(story: Story, draw: Random, others: list[Story]) -> None:
    at = draw.randrange(len(story) + 1)
    match draw.randrange(5):
        case 0 if at < len(story):
            del story[at]
        case 1 if at < len(story):
            story.insert(draw.randrange(len(story)), story[at])
        case 2 if at < len(story):
            other = draw.randrange(len(story))
            story[at], story[other] = story[other], story[at]
        case 3:
            other_story = draw.choice(others)
            start = draw.randrange(len(other_story))
            story[at:at] = other_story[start : start + 4]
        case _:
            story.insert(at, Step(draw.choice([Do.BREAK, Do.MORE, Do.MORE, Do.SEND])))


def _change_header(frames: tuple[bytes, ...], draw: Random) -> tuple[bytes, ...]:
    try:
        values = msgpack.unpackb(frames[0], max_array_len=64) if frames else None
    except (ValueError, msgpack.UnpackException):
        values = None
    if not isinstance(values, list) or not values:
        return _change_bytes(frames, draw)
    at = draw.randrange(len(values))
    if isinstance(values[at], int) and draw.random() < 0.5:
        values[at] = min(abs(values[at] + draw.choice([-1, 1])), 2**64 - 1)
    else:
        values[at] = draw.choice(NUMBERS if draw.random() < 0.7 else OTHERS)
    return (msgpack.packb(values), *frames[1:])


def _change_bytes(frames: tuple[bytes, ...], draw: Random) -> tuple[bytes, ...]:
    if not frames:
        return (draw.randbytes(draw.randrange(80)),)
    at = draw.randrange(len(frames))
    data = bytearray(frames[at])
    where = draw.randrange(len(data) + 1)
    match draw.randrange(5):
        case 0 if where < len(data):
            data[where] ^= 1 << draw.randrange(8)
        case 1:
            data[where:where] = draw.randbytes(draw.randint(1, 4))
        case 2:
            del data[where : where + draw.randint(1, 4)]
        case 3 if where < len(data):
            data[where] = draw.choice(TYPES)
        case _:
            del data[where:]
    return (*frames[:at], bytes(data), *frames[at + 1 :])


def _change_frames(frames: tuple[bytes, ...], draw: Random) -> tuple[bytes, ...]:
    changed = list(frames)
    at = draw.randrange(len(frames) + 1)
    match draw.randrange(3):
        case 0 if at < len(frames):
            del changed[at]
        case 1 if at < len(frames):
            changed.insert(at, changed[draw.randrange(len(frames))])
        case _:
            changed.insert(at, draw.randbytes(draw.choice([0, 1, 8, 12, 32])))
    return tuple(changed[:MOST_FRAMES])
