"""Data that ship with scikit-learn."""

import subprocess
import sys

import torch
from sklearn.datasets import load_digits

from p2pfl.data import datasets


def agrees(dataset):
    bunch = load_digits()
    torch.testing.assert_close(
        dataset.x, torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16, rtol=0, atol=0
    )
    assert dataset.y.tolist() == bunch.target.tolist()
    assert list(dataset.classes) == [str(name) for name in bunch.target_names]


def test_digits_are_those_of_scikit_learn(tmp_path):
    agrees(datasets.digits().load(tmp_path))


def test_digits_are_found_wherever_scikit_learn_keeps_them(tmp_path, monkeypatch):
    monkeypatch.setattr(datasets, "DIGITS", "sklearn/moved.csv")
    agrees(datasets.digits().load(tmp_path))


def test_who_trains_on_digits_does_not_wait_for_scikit_learn():
    code = (
        "import sys; from p2pfl.experiment.experiment import Experiment\n"
        "Experiment.from_dict({}).federation(); print('sklearn' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"
