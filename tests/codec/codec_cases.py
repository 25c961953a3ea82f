"""Every codec, and the bytes its messages are to have."""

from __future__ import annotations

from collections.abc import Callable
from math import ceil
from typing import NamedTuple

from p2pfl import codec
from p2pfl.codec import Codec


class Case(NamedTuple):
    codec: Codec
    size: Callable[[int], int]  # of d parameters in single precision
    lots: bool = False  # whether it draws


def share(d: int, multiple: int = 1) -> int:
    """A fifth of the entries, of which there are as many as a multiple."""
    return max(1, round(0.2 * (ceil(d / multiple) * multiple)))


CASES: dict[str, Case] = {
    "identity": Case(codec.identity(), lambda d: 4 * d),
    "top_k": Case(codec.top_k(share=0.2), lambda d: 8 * share(d)),
    "top_k bitmap": Case(
        codec.top_k(share=0.2, indices="bitmap"), lambda d: 4 * share(d) + ceil(d / 8)
    ),
    "random_k": Case(codec.random_k(share=0.2), lambda d: 8 * share(d), lots=True),
    "random_k seed": Case(
        codec.random_k(share=0.2, indices="seed"), lambda d: 4 * share(d) + 8, lots=True
    ),
    "half": Case(codec.half(), lambda d: 2 * d + 4),
    "bfloat16": Case(codec.bfloat16(), lambda d: 2 * d + 4),
    "int8": Case(codec.int8(), lambda d: d + 4, lots=True),
    "int8 bucket": Case(codec.int8(bucket=7), lambda d: d + 4 * ceil(d / 7), lots=True),
    "qsgd": Case(codec.qsgd(levels=4), lambda d: ceil(4 * d / 8) + 4, lots=True),
    "qsgd 1": Case(codec.qsgd(levels=1), lambda d: ceil(2 * d / 8) + 4, lots=True),
    "qsgd bucket": Case(codec.qsgd(levels=127, bucket=7), lambda d: d + 4 * ceil(d / 7), lots=True),
    "sign": Case(codec.sign(), lambda d: ceil(d / 8) + 4),
    "sign bucket": Case(codec.sign(bucket=7), lambda d: ceil(d / 8) + 4 * ceil(d / 7)),
    "wavelet": Case(codec.wavelet(share=0.2, levels=3), lambda d: 8 * share(d, 8)),
    "wavelet bitmap": Case(
        codec.wavelet(share=0.2, levels=3, indices="bitmap"),
        lambda d: 4 * share(d, 8) + ceil(d / 8),
    ),
}
