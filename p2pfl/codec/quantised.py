"""Codecs that send every entry, in fewer bits: multiples of a unit of its row."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor

from p2pfl import rng
from p2pfl.codec.base import Codec
from p2pfl.codec.bits import pack, unpack
from p2pfl.learning.tree import wide


class Quantised(NamedTuple):
    """Multiples of a unit."""

    values: Tensor  # [rows, d], int8, float16 or bfloat16
    unit: Tensor  # [rows, buckets], of the parameters' type, float32 at least


class Bits(NamedTuple):
    """Multiples of a unit, as whole numbers of a few bits each."""

    values: Tensor  # [rows, bytes], uint8
    unit: Tensor  # [rows, buckets], of the parameters' type, float32 at least


def half() -> Codec[Quantised]:
    """Send half-precision numbers (IEEE 754 binary16): ``2 d + 4`` bytes.

    A row is divided by a power of two first, so that its largest entry neither overflows nor
    drowns the others: each errs by at most 2^-11 of itself, or 2^-39 of the largest.
    """
    return _two_bytes(torch.float16)


def bfloat16() -> Codec[Quantised]:
    """Send the upper halves of single-precision numbers: ``2 d + 4`` bytes.

    Each errs by at most 2^-8 of itself. Divided by a power of two first, as for `half`.
    """
    return _two_bytes(torch.bfloat16)


def int8(bucket: int | None = None) -> Codec[Quantised]:
    """Round to 255 levels between minus and plus the largest magnitude: ``d + 4`` bytes.

    Unbiased: which of the two nearest levels is drawn, in proportion to how near it is. An entry
    errs by less than a level, u = max|x| / 127, and by at most ``u^2 / 4`` in the mean square.
    With `bucket`, every so many entries have a level of their own, 4 bytes each.
    """
    _check_bucket(bucket)

    def encode(block: Tensor, keys: Tensor) -> Quantised:
        unit = _unit(_cut(block, bucket).abs().amax(2), 127)
        return Quantised(_drawn(block, unit, keys, bucket, 127).to(torch.int8), unit)

    def decode(packed: Quantised, d: int) -> Tensor:
        _check_unit(packed.unit, d, bucket)
        if packed.values.shape[1] != d or bool((packed.values == -128).any()):
            raise ValueError(f"not {d} numbers from -127 to 127")
        return packed.values.to(packed.unit.dtype) * _along(packed.unit, d, bucket)

    return Codec(encode, decode)


def qsgd(levels: int = 4, bucket: int | None = None) -> Codec[Bits]:
    """Round to so many levels between zero and the row's norm (QSGD, Alistarh et al. 2017).

    ``ceil(log2(2 levels + 1)) d / 8 + 4`` bytes. Unbiased; adds at most
    ``min(d / levels^2, sqrt(d) / levels)`` times the squared norm as variance, which for long
    rows is a multiple of it. With `bucket`, every so many entries count as a row, and have a norm
    of their own, 4 bytes each. Methods that send differences, as `choco`, may diverge unless
    ``levels > sqrt(bucket)``.
    """
    if not 1 <= levels <= 127:
        raise ValueError(f"levels = {levels} is not in 1..127")
    _check_bucket(bucket)
    bits = (2 * levels).bit_length()

    def encode(block: Tensor, keys: Tensor) -> Bits:
        cut = _cut(block, bucket)  # of which squares may overflow
        norm = torch.linalg.vector_norm(cut, dim=2, dtype=torch.float64)
        unit = _unit(norm.to(cut.dtype), levels)
        drawn = _drawn(block, unit, keys, bucket, levels)
        return Bits(pack((drawn + levels).to(torch.uint8), bits), unit)

    def decode(packed: Bits, d: int) -> Tensor:
        _check_unit(packed.unit, d, bucket)
        values = unpack(packed.values, bits, d)
        if bool((values > 2 * levels).any()):
            raise ValueError(f"a level beyond {levels}")
        return (values.to(packed.unit.dtype) - levels) * _along(packed.unit, d, bucket)

    return Codec(encode, decode)


def sign(bucket: int | None = None) -> Codec[Bits]:
    """Send the signs and the mean magnitude: ``d / 8 + 4`` bytes (Karimireddy et al. 2019).

    Loses exactly ``1 - |x|_1^2 / (d |x|^2)`` of the squared norm, 36 % for normal entries. Zero
    counts as positive. With `bucket`, every so many entries have a mean of their own, 4 bytes
    each. Biased: for methods that make up for what is lost.
    """
    _check_bucket(bucket)

    def encode(block: Tensor, keys: Tensor) -> Bits:
        total, d = _cut(block, bucket).abs().sum(2), block.shape[1]
        size = min(bucket or d, d)
        first = torch.arange(0, d, size, device=block.device)
        return Bits(pack((block >= 0).to(torch.uint8), 1), total / (d - first).clamp(max=size))

    def decode(packed: Bits, d: int) -> Tensor:
        _check_unit(packed.unit, d, bucket)
        signs = unpack(packed.values, 1, d).to(packed.unit.dtype) * 2 - 1
        return signs * _along(packed.unit, d, bucket)

    return Codec(encode, decode)


def _two_bytes(dtype: torch.dtype) -> Codec[Quantised]:
    def encode(block: Tensor, keys: Tensor) -> Quantised:
        exact = block.to(wide(block))
        exponent = torch.frexp(exact.abs().amax(1, keepdim=True)).exponent.clamp(min=-100)
        # The largest entry is below 2^15 then, and the largest number of float16 just below 2^16.
        unit = torch.ldexp(torch.ones_like(exact[:, :1]), exponent - 15)
        return Quantised((exact / unit).to(dtype), unit)

    def decode(packed: Quantised, d: int) -> Tensor:
        _check_unit(packed.unit, d, None)
        if packed.values.shape[1] != d:
            raise ValueError(f"{packed.values.shape[1]} numbers instead of {d}")
        return packed.values.to(packed.unit.dtype) * packed.unit

    return Codec(encode, decode)


def _unit(largest: Tensor, levels: int) -> Tensor:
    """Return a unit of which so many levels reach `largest`, and not zero."""
    rounded_up = torch.nextafter(largest / levels, torch.full_like(largest, math.inf))
    return rounded_up.clamp(min=torch.finfo(largest.dtype).tiny)


def _drawn(block: Tensor, unit: Tensor, keys: Tensor, bucket: int | None, levels: int) -> Tensor:
    """Return multiples of the unit, drawn so that their mean is the block; float64."""
    d = block.shape[1]
    exact = block.double() / _along(unit, d, bucket).double()
    # A sum of a whole number and a draw just below one is rounded up. Where training has diverged
    # the unit says so.
    drawn = (exact + rng.uniform(keys, d)).floor_().clamp_(-levels, levels)
    return drawn.nan_to_num_()


def _cut(block: Tensor, bucket: int | None) -> Tensor:
    """Return the entries of each bucket, with zeros after the last, ``[rows, buckets, size]``."""
    exact, d = block.to(wide(block)), block.shape[1]
    size = min(bucket or d, d)
    padded = torch.nn.functional.pad(exact, (0, -d % size))
    return padded.view(len(padded), -1, size)


def _along(unit: Tensor, d: int, bucket: int | None) -> Tensor:
    """Return the unit of each entry, ``[rows, d]``, or of all, ``[rows, 1]``."""
    return unit if bucket is None or bucket >= d else unit.repeat_interleave(bucket, dim=1)[:, :d]


def _check_bucket(bucket: int | None) -> None:
    if bucket is not None and bucket < 1:
        raise ValueError(f"bucket = {bucket} is below 1")


def _check_unit(unit: Tensor, d: int, bucket: int | None) -> None:
    if unit.shape[1] != -(-d // (bucket or d)):
        raise ValueError(f"{unit.shape[1]} units for {d} numbers")
    if bool((unit < 0).any()):
        raise ValueError("a unit below zero")
