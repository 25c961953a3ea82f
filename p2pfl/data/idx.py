"""Images in the IDX files of MNIST (LeCun, Cortes & Burges 1998) and its many successors."""

from __future__ import annotations

import gzip
import math
import struct
import zlib
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt
import torch

from p2pfl.data.dataset import Dataset, Source
from p2pfl.errors import UserError

Bytes = npt.NDArray[np.uint8]

_IMAGES = "*images[-.]idx3-ubyte*"
_DEFLATE_RATIO = 1032  # no deflate stream unpacks to more than this multiple of its size


def idx(path: str = ".") -> Source:
    """Read a folder of IDX image files, plain or gzipped, each beside its labels.

    Files named ``train-…`` come first and ``t10k-…`` next, so ``last(10000)`` holds out
    MNIST's own test set. Images are ``[1, H, W]`` in [0, 1]; the classes are the numbers
    from 0 to the largest label. Nothing is allocated because a header says so before the
    file is known to be that large; a file that is not what it says is a
    :class:`UserError`.
    """

    def load(data_dir: Path, only: int | None = None) -> Dataset:
        pairs = _pairs(data_dir / path)
        images = [_read(file, 3) for file, _ in pairs]
        labels = [_read(file, 1) for _, file in pairs]
        for (file, of), image, label in zip(pairs, images, labels, strict=True):
            if len(image) != len(label):
                raise UserError(
                    f"{file}: {len(image)} images, but {of.name} has {len(label)} labels"
                )
            if image.shape[1:] != images[0].shape[1:]:
                raise UserError(
                    f"{file}: images of shape {image.shape[1:]}, those of "
                    f"{pairs[0][0].name} are {images[0].shape[1:]}"
                )
        x = torch.from_numpy(np.concatenate(images)).unsqueeze(1)
        y = torch.from_numpy(np.concatenate(labels)).long()
        classes = tuple(str(label) for label in range(int(y.max()) + 1))
        return Dataset(x.float().div_(255), y, classes=classes)

    return Source(load)


def _pairs(folder: Path) -> list[tuple[Path, Path]]:
    """Return the image files of a folder, each with its labels, in reading order."""
    if not folder.is_dir():
        raise UserError(f"{folder}: there is no such folder")
    found: dict[str, Path] = {}
    for file in sorted(folder.glob(_IMAGES)):
        found.setdefault(file.name.removesuffix(".gz"), file)  # the plain file sorts first
    if not found:
        raise UserError(f"{folder}: no file named like train-images-idx3-ubyte[.gz] in there")
    names = sorted(found, key=_reading_order)
    return [(found[name], _labels_of(folder, name)) for name in names]


def _reading_order(name: str) -> tuple[int, str]:
    return (0 if name.startswith("train") else 1 if name.startswith("t10k") else 2), name


def _labels_of(folder: Path, images: str) -> Path:
    name = images.replace("images", "labels").replace("idx3", "idx1")
    for file in (folder / name, folder / f"{name}.gz"):
        if file.is_file():
            return file
    raise UserError(f"{folder}: {images} is there, but neither {name} nor {name}.gz")


def _read(file: Path, dimensions: int) -> Bytes:
    """Return the unsigned bytes of one IDX file, with its `dimensions` axes."""
    try:
        size = file.stat().st_size
        if file.suffix != ".gz":
            with file.open("rb") as stream:
                return _parse(stream, file, dimensions, size)
        with gzip.open(file, "rb") as stream:
            return _parse(stream, file, dimensions, None)
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{file}: cannot be read: {error}") from error


def _parse(
    stream: IO[bytes] | gzip.GzipFile, file: Path, dimensions: int, size: int | None
) -> Bytes:
    """Return the array in a stream of `size` bytes, or of a gzipped file's contents."""
    head = stream.read(4 + 4 * dimensions)
    magic = struct.pack(">I", 0x0800 + dimensions)  # 0x08: unsigned bytes
    if len(head) < 4 + 4 * dimensions or head[:4] != magic:
        raise UserError(
            f"{file}: not an IDX file of unsigned bytes in {dimensions} dimensions: it starts "
            f"with {head[:4].hex() or 'nothing'}, not {magic.hex()}"
        )
    shape = struct.unpack(f">{dimensions}I", head[4:])
    count = math.prod(shape)
    limit = file.stat().st_size * _DEFLATE_RATIO if size is None else size - len(head)
    if not 0 < count <= limit or (size is not None and count != limit):
        raise UserError(
            f"{file}: the header promises {count} bytes (shape {shape}), which a file of "
            f"{file.stat().st_size} bytes does not hold"
        )
    body = stream.read(count + 1)  # one more, to see that there is none
    if len(body) != count:
        more = "more" if len(body) > count else f"only {len(body)}"
        raise UserError(
            f"{file}: the header promises {count} bytes (shape {shape}), here are {more}"
        )
    return np.frombuffer(bytearray(body), dtype=np.uint8).reshape(shape)
