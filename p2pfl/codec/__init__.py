"""Lossy compression: what travels instead of a block of parameters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from p2pfl.codec.base import Codec, Dense, identity
from p2pfl.codec.quantised import Bits, Quantised, bfloat16, half, int8, qsgd, sign
from p2pfl.codec.sparse import Marked, Seeded, Sparse, random_k, top_k
from p2pfl.codec.wavelet import wavelet

CODECS: dict[str, Callable[..., Codec[Any]]] = {
    "bfloat16": bfloat16,
    "half": half,
    "identity": identity,
    "int8": int8,
    "qsgd": qsgd,
    "random_k": random_k,
    "sign": sign,
    "top_k": top_k,
    "wavelet": wavelet,
}

__all__ = [
    "CODECS",
    "Bits",
    "Codec",
    "Dense",
    "Marked",
    "Quantised",
    "Seeded",
    "Sparse",
    "bfloat16",
    "half",
    "identity",
    "int8",
    "qsgd",
    "random_k",
    "sign",
    "top_k",
    "wavelet",
]
