"""IDX files, good and bad."""

from __future__ import annotations

import gzip
import struct

import numpy as np
import pytest
import torch

from p2pfl.data import DATASETS
from p2pfl.errors import UserError


def idx_bytes(array):
    array = np.asarray(array, dtype=np.uint8)
    return struct.pack(f">I{array.ndim}I", 0x800 + array.ndim, *array.shape) + array.tobytes()


IMAGES = np.arange(2 * 3 * 4).reshape(2, 3, 4) * 10
LABELS = np.array([2, 0])


def write(folder, name="train", images=IMAGES, labels=LABELS, pack=False):
    end, dress = (".gz", gzip.compress) if pack else ("", bytes)
    (folder / f"{name}-images-idx3-ubyte{end}").write_bytes(dress(idx_bytes(images)))
    (folder / f"{name}-labels-idx1-ubyte{end}").write_bytes(dress(idx_bytes(labels)))


def load(folder):
    return DATASETS["idx"]().load(folder, None)


@pytest.mark.parametrize("pack", [False, True])
def test_round_trip(tmp_path, pack):
    write(tmp_path, pack=pack)
    data = load(tmp_path)
    assert data.x.equal(torch.tensor(IMAGES, dtype=torch.float32).unsqueeze(1) / 255)
    assert data.y.tolist() == [2, 0]
    assert (data.classes, data.shape, data.numeric) == (("0", "1", "2"), (1, 3, 4), None)


def test_train_comes_before_t10k_before_others(tmp_path):
    for name, label in (("extra", 3), ("t10k", 2), ("train", 1)):
        write(tmp_path, name, labels=np.array([label, label]), pack=name == "train")
    assert load(tmp_path).y.tolist() == [1, 1, 2, 2, 3, 3]


def refused(folder):
    with pytest.raises(UserError) as caught:
        load(folder)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("pack", [False, True])
@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda b: b[:-1], "promises 24 bytes"),
        (lambda b: b + b"x", "promises 24 bytes"),
        (lambda b: b"\0\0\x0d\x03" + b[4:], "not an IDX file"),
        (lambda b: b[:9], "not an IDX file"),
        (lambda b: b"", "not an IDX file"),
        (lambda b: b[:4] + b"\xff" * 12 + b[16:], "does not hold"),
        (lambda b: b[:4] + b"\0" * 12, "promises 0 bytes"),
    ],
)
def test_a_spoiled_file_is_refused(tmp_path, pack, spoil, message):
    write(tmp_path, pack=pack)
    (file,) = tmp_path.glob("*images*")
    body = spoil(idx_bytes(IMAGES))
    file.write_bytes(gzip.compress(body) if pack else body)
    assert message in refused(tmp_path)
    assert file.name in refused(tmp_path)


@pytest.mark.parametrize("spoil", [lambda b: b[:-9], lambda b: b[:20] + b"\xff\xff" + b[22:]])
def test_a_broken_gzip_is_refused(tmp_path, spoil):
    write(tmp_path, pack=True)
    (file,) = tmp_path.glob("*images*")
    file.write_bytes(spoil(file.read_bytes()))
    assert "cannot be read" in refused(tmp_path)


def test_files_must_belong_together(tmp_path):
    assert "no such folder" in refused(tmp_path / "no")
    assert "no file named like" in refused(tmp_path)
    write(tmp_path, labels=np.array([1, 2, 3]))
    assert "2 images" in refused(tmp_path)
    write(tmp_path)
    write(tmp_path, "t10k", images=np.zeros((2, 5, 5)))
    assert "images of shape (5, 5)" in refused(tmp_path)
    (tmp_path / "t10k-labels-idx1-ubyte").unlink()
    assert "neither t10k-labels-idx1-ubyte nor" in refused(tmp_path)
