"""Tensors and texts in one safetensors file, written and read a few megabytes at a time.

The file is what the safetensors library reads and writes: eight bytes, a header in JSON, the
bytes of the tensors. Ours also holds a SHA-256 of all that, and neither writing nor reading needs
memory for a second copy of the tensors. The header is read first, so that everything is known to
fit before any memory is asked for.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

CHUNK = 4 << 20  # bytes that are read, hashed or written at once
LONGEST = 16 << 20  # bytes of a header
DIGEST = "sha256"

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Damaged(ValueError):
    """A file is not what was written; the message says in what."""


class Header(NamedTuple):
    """The head of a file.

    Attributes:
        texts: by key; the digest is among them.
        forms: the type and the shape of each tensor, in the order of the file.
    """

    texts: dict[str, str]
    forms: dict[str, tuple[torch.dtype, tuple[int, ...]]]


def encode(tensors: Mapping[str, Tensor], texts: Mapping[str, str]) -> Iterator[memoryview]:
    """Yield a file piece by piece; it goes through the tensors twice, first for the digest.

    Raises:
        KeyError: a type of tensor that such files do not hold.
    """
    # The widest first, so that every tensor starts at a multiple of its element size.
    order = sorted(tensors, key=lambda name: (-tensors[name].element_size(), name))
    forms = {name: (tensors[name].dtype, tuple(tensors[name].shape)) for name in order}
    digest = hashlib.sha256(_text(texts, forms))
    for name in order:
        for part in _parts(tensors[name]):
            digest.update(part)
    head = _text({**texts, DIGEST: digest.hexdigest()}, forms)
    head += b" " * (-len(head) % 8)
    yield memoryview(len(head).to_bytes(8, "little") + head)
    for name in order:
        yield from _parts(tensors[name])


def read_header(file: BinaryIO) -> Header:
    """Read the head of a file; what follows are its tensors.

    Raises:
        Damaged: it is no such file, or not as long as its head says.
    """
    size = file.seek(0, 2)
    file.seek(0)
    length = int.from_bytes(file.read(8), "little")
    if size < 8 or length > min(LONGEST, size - 8):
        raise Damaged(f"it has {size} bytes, too few for its header")
    try:
        table = json.loads(file.read(length))
        texts = table.pop("__metadata__")
        forms, end = {}, 0
        for name, entry in table.items():
            forms[name] = form = (DTYPES[entry["dtype"]], tuple(entry["shape"]))
            start, end = end, end + _size(form)
            if entry["data_offsets"] != [start, end]:
                raise ValueError(name)
        if not all(type(text) is str for text in texts.values()):
            raise TypeError
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        raise Damaged("its header is damaged") from None
    if size != 8 + length + end:
        raise Damaged(f"it has {size} bytes, not {8 + length + end}")
    return Header(texts, forms)


def read_tensors(file: BinaryIO, header: Header) -> dict[str, Tensor]:
    """Read the tensors that follow a header.

    Raises:
        Damaged: they are not what was written.
    """
    texts = dict(header.texts)
    wanted = texts.pop(DIGEST, "")
    digest = hashlib.sha256(_text(texts, header.forms))
    tensors = {}
    for name, (dtype, shape) in header.forms.items():
        tensors[name] = torch.empty(shape, dtype=dtype)
        for part in _parts(tensors[name]):
            filled = 0
            while filled < len(part):
                got = file.readinto(part[filled:])  # type: ignore[attr-defined]
                if not got:
                    raise Damaged("it ends too early")
                filled += got
            digest.update(part)
    if digest.hexdigest() != wanted:
        raise Damaged("its SHA-256 is not that of its contents")
    return tensors


def _text(texts: Mapping[str, str], forms: Mapping[str, Any]) -> bytes:
    table: dict[str, Any] = {"__metadata__": dict(texts)}
    end = 0
    for name, (dtype, shape) in forms.items():
        start, end = end, end + _size((dtype, shape))
        table[name] = {"dtype": NAMES[dtype], "shape": shape, "data_offsets": [start, end]}
    return json.dumps(table, separators=(",", ":")).encode()


def _size(form: tuple[torch.dtype, tuple[int, ...]]) -> int:
    dtype, shape = form
    if not all(type(length) is int and length >= 0 for length in shape):
        raise ValueError(f"{shape} is not a shape")
    return math.prod(shape) * dtype.itemsize


def _parts(tensor: Tensor) -> Iterator[memoryview]:
    """Yield the bytes of a tensor; if it is contiguous and in main memory, not copies of them."""
    flat = tensor.detach().reshape(-1)
    step = CHUNK // tensor.element_size()
    for start in range(0, len(flat), step):
        part = flat[start : start + step].cpu()
        yield part.view(torch.uint8).numpy().data
