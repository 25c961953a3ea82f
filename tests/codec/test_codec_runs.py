"""Whole runs with compressed models: the same bytes and numbers in every runtime."""

from __future__ import annotations

from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import p2pfl
from p2pfl.algorithms import ALGORITHMS
from p2pfl.codec import CODECS
from p2pfl.errors import UserError

D = 64 * 4 + 4 + 4 * 10 + 10  # parameters of the model below
HEADER = 37  # bytes of a chunk's header with small numbers, see docs/wire.md
HAAR_D = 16 * ceil(D / 16)  # coefficients
K, HAAR_K = round(0.1 * D), round(0.1 * HAAR_D)

# For every way to send a model, the bytes of a message in single precision.
CODED: dict[str, tuple[Any, int]] = {
    "identity": ("identity", 4 * D),
    "top_k": ("top_k:share=0.1", 8 * K),
    "top_k bitmap": ("top_k:share=0.1,indices=bitmap", 4 * K + ceil(D / 8)),
    "random_k": ("random_k:share=0.1", 8 * K),
    "random_k seed": ("random_k:share=0.1,indices=seed", 4 * K + 8),
    "half": ("half", 2 * D + 4),
    "bfloat16": ("bfloat16", 2 * D + 4),
    "int8": ("int8", D + 4),
    "int8 bucket": ("int8:bucket=50", D + 4 * ceil(D / 50)),
    "qsgd": ("qsgd:levels=7,bucket=32", ceil(4 * D / 8) + 4 * ceil(D / 32)),
    "sign": ("sign", ceil(D / 8) + 4),
    "wavelet": ("wavelet:share=0.1", 8 * HAAR_K),
}
CASES: dict[str, tuple[dict[str, Any], int]] = {
    f"choco {name}": ({"name": "choco", "codec": spec}, size)
    for name, (spec, size) in CODED.items()
}
CASES |= {
    "beer qsgd": ({"name": "beer", "codec": CODED["qsgd"][0]}, 2 * CODED["qsgd"][1]),
    "beer random_k": (
        {"name": "beer", "codec": CODED["random_k seed"][0]},
        2 * CODED["random_k seed"][1],
    ),
    "deepsqueeze sign": ({"name": "deepsqueeze", "codec": "sign"}, CODED["sign"][1]),
    "quantised int8": ({"name": "quantised", "codec": "int8"}, CODED["int8"][1]),
    "moniqua": ({"name": "moniqua", "theta": 1.0}, D),
    "moniqua 3": ({"name": "moniqua", "theta": 1.0, "bits": 3}, ceil(3 * D / 8)),
    "jwins": ({"name": "jwins", "share": 0.1}, 4 * HAAR_K + HAAR_D // 8),
    "jwins list": ({"name": "jwins", "share": 0.1, "indices": "list"}, 8 * HAAR_K),
}


def small(algorithm: dict[str, Any], dtype: str = "float32", **sections: Any) -> dict[str, Any]:
    return {
        "nodes": 4,
        "seed": 3,
        "partition": {"name": "dirichlet", "alpha": 0.5},
        "model": {"name": "mlp", "hidden": [4]},
        "training": {"batch_size": 16, "dtype": dtype},
        "optimiser": {"name": "sgd", "lr": 0.1, "momentum": 0.5},
        "algorithm": algorithm,
        "topology": {"name": "ring"},
        "pace": {"rounds": 3, "local_steps": 2},
        "evaluation": {"every": 3},
        **sections,
    }


def assert_same(ours: Any, theirs: Any) -> None:
    for column in ("round", "node", "bytes_sent", "bytes_received"):
        assert ours.metrics[column].tolist() == theirs.metrics[column].tolist(), column
    for column in ("train_loss", "eval_loss"):
        np.testing.assert_allclose(ours.metrics[column], theirs.metrics[column], rtol=1e-9)


def test_nothing_is_left_out():
    assert {name.split()[0] for name in CODED} == CODECS.keys()
    plain = {"d2", "dpsgd", "fedavg", "gossip", "gradient_tracking", "local", "push_sum"}
    assert {name.split()[0] for name in CASES} == ALGORITHMS.keys() - plain


@pytest.mark.parametrize("name", CASES)
def test_what_is_counted_is_what_travels(name):
    algorithm, size = CASES[name]
    for on in ("simulate", "emulate"):
        result = p2pfl.run(small(algorithm, pace={"rounds": 1, "local_steps": 1}), on=on)
        assert result.metrics["bytes_sent"].tolist() == [2 * (size + HEADER)] * 4
        assert result.metrics["bytes_received"].tolist() == [2 * (size + HEADER)] * 4


@pytest.mark.parametrize("name", CASES)
def test_the_emulator_gives_the_numbers_of_the_simulator(name):
    experiment = small(CASES[name][0], "float64")
    assert_same(p2pfl.run(experiment, on="emulate"), p2pfl.run(experiment, on="simulate"))


STATELESS = ["quantised int8", "deepsqueeze sign", "moniqua 3", "jwins"]


@pytest.mark.parametrize("name", STATELESS)
def test_neighbours_may_change(name):
    experiment = small(CASES[name][0], "float64", topology={"name": "random_matching"})
    assert_same(p2pfl.run(experiment, on="emulate"), p2pfl.run(experiment, on="simulate"))


@pytest.mark.parametrize("name", STATELESS)
def test_neighbours_may_come_and_go(name):
    churn = {"name": "rate", "share": "100% a minute", "mean_down": 2.0}
    pace = {"rounds": 40, "local_steps": 2}
    experiment = small(CASES[name][0], nodes=8, pace=pace, churn=churn, network={"compute": 0.5})
    result = p2pfl.run(experiment, on="emulate")
    assert result.summary["status"] == "finished"
    assert result.summary["node_updates"] < 8 * 40 * 2  # some were away
    last = result.metrics["train_loss"][result.metrics["round"] == 39]
    assert len(last) > 4
    assert last.mean() < 1.5  # they learn all the same: it began at 2.3


@pytest.mark.processes
@pytest.mark.parametrize("name", ["choco qsgd", "jwins"])
def test_processes_give_the_numbers_of_the_simulator(name: str, tmp_path: Path):
    experiment = small(CASES[name][0], "float64")
    processes = p2pfl.run(experiment, on="local", out=tmp_path / "run")
    assert processes.summary["rejected"] == processes.summary["missed"] == 0
    assert_same(processes, p2pfl.run(experiment, on="simulate"))


def test_processes_send_as_many_bytes(tmp_path: Path):
    algorithm, size = CASES["beer qsgd"]
    processes = p2pfl.run(small(algorithm), on="local", out=tmp_path / "run")
    assert processes.metrics["bytes_sent"].tolist() == [2 * (size + HEADER)] * 12


MISTAKES = [
    ({"name": "choco"}, "algorithm.codec is missing"),
    ({"name": "beer", "codec": "int9"}, "algorithm.codec.name = 'int9' is unknown"),
    ({"name": "choco", "codec": "qsgd:levels=300"}, "algorithm.codec: levels = 300"),
    ({"name": "choco", "codec": "int8:bucket=0"}, "algorithm.codec: bucket = 0"),
    ({"name": "choco", "codec": "top_k:k=9,indices=seed"}, "algorithm.codec.indices = 'seed'"),
    ({"name": "moniqua"}, "algorithm.theta is missing"),
    ({"name": "moniqua", "theta": -1.0}, "algorithm: theta = -1"),
    ({"name": "jwins"}, "algorithm: give either k"),
]


@pytest.mark.parametrize(("algorithm", "words"), MISTAKES)
def test_mistakes_name_the_key(algorithm, words):
    with pytest.raises(UserError) as told:
        p2pfl.run(small(algorithm))
    assert words in str(told.value)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize("name", ["choco", "beer"])
def test_what_remembers_its_neighbours_needs_them_to_stay(name):
    with pytest.raises(UserError, match="neighbours that stay"):
        p2pfl.run(small({"name": name, "codec": "int8"}, topology={"name": "random_matching"}))
