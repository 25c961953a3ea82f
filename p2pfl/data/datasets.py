"""The data sets an experiment can name: scikit-learn's, made-up ones, and the user's files."""

from __future__ import annotations

from collections.abc import Callable
from importlib.metadata import distribution
from pathlib import Path
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch

from p2pfl.data.dataset import Dataset, Source
from p2pfl.data.encoder import Column, Encoder
from p2pfl.data.idx import idx
from p2pfl.data.synthetic import synthetic
from p2pfl.data.tabular import csv

DIGITS = "sklearn/datasets/data/digits.csv.gz"


def digits() -> Source:
    """Handwritten digits: 1797 images ``[1, 8, 8]`` in [0, 1], 10 classes.

    Alpaydin & Kaynak (1998), UCI; shipped with scikit-learn.
    """

    def load(data_dir: Path, only: int | None = None) -> Dataset:
        pixels, labels = _digits()
        x = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / 16
        y = torch.tensor(labels, dtype=torch.int64)
        return Dataset(x, y, classes=tuple(str(digit) for digit in range(10)))

    return Source(load)


def breast_cancer() -> Source:
    """Wisconsin breast cancer: 569 rows, 30 numbers, 2 classes (0 = malignant).

    Street, Wolberg & Mangasarian (1993), UCI; shipped with scikit-learn.
    """

    def load(data_dir: Path, only: int | None = None) -> Dataset:
        from sklearn.datasets import load_breast_cancer

        return _classification(load_breast_cancer())

    return Source(load)


def wine() -> Source:
    """Wine recognition: 178 rows, 13 numbers, 3 classes.

    Aeberhard & Forina (1991), UCI; shipped with scikit-learn.
    """

    def load(data_dir: Path, only: int | None = None) -> Dataset:
        from sklearn.datasets import load_wine

        return _classification(load_wine())

    return Source(load)


def diabetes() -> Source:
    """Diabetes progression: 442 rows, 10 numbers, regression.

    The target is raw, a disease score of 25 to 346 (mean 152, standard deviation 77), so
    a squared error is in thousands. Efron et al. (2004); shipped with scikit-learn.
    """

    def load(data_dir: Path, only: int | None = None) -> Dataset:
        from sklearn.datasets import load_diabetes

        bunch = load_diabetes(scaled=False)
        return _table(bunch, torch.tensor(bunch.target, dtype=torch.float32), ())

    return Source(load)


DATASETS: dict[str, Callable[..., Source]] = {
    "digits": digits,
    "breast_cancer": breast_cancer,
    "wine": wine,
    "diabetes": diabetes,
    "synthetic": synthetic,
    "idx": idx,
    "csv": csv,
}
"""The factories by the name a section gives."""


class _Bunch(Protocol):
    """What scikit-learn's loaders return."""

    data: npt.NDArray[np.float64]
    target: npt.NDArray[np.float64]
    target_names: list[str]
    feature_names: list[str]


def _digits() -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the pixels of each image, ``[images, 64]``, and what it shows.

    Every peer of a default run needs them, and importing scikit-learn takes a second: so its
    file is read without, if it is where it has always been.
    """
    file = Path(str(distribution("scikit-learn").locate_file(DIGITS)))
    if not file.exists():
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        return pixels, labels
    rows = np.loadtxt(file, delimiter=",")
    return rows[:, :-1], rows[:, -1]


def _classification(bunch: _Bunch) -> Dataset:
    y = torch.tensor(bunch.target, dtype=torch.int64)
    return _table(bunch, y, tuple(str(name) for name in bunch.target_names))


def _table(bunch: _Bunch, y: torch.Tensor, classes: tuple[str, ...]) -> Dataset:
    encoder = Encoder(tuple(Column(str(name)) for name in bunch.feature_names))
    x = torch.tensor(bunch.data, dtype=torch.float32)
    return Dataset(
        x, y, encoder.features, classes=classes, numeric=encoder.numeric, encoder=encoder
    )
