"""``topology show`` and ``compare``, ``topologies`` and ``algorithms``, as scripts use them."""

from __future__ import annotations

import json
import re
import subprocess
import sys

import pytest
from typer.testing import CliRunner

from p2pfl.algorithms import ALGORITHMS
from p2pfl.cli import app
from p2pfl.errors import UserError
from p2pfl.experiment.sections import TOPOLOGIES


def p2pfl(*words):
    return CliRunner().invoke(app, list(map(str, words)))


def told(*words):
    done = p2pfl(*words, "--format", "json")
    assert done.exit_code == 0, done.output
    return json.loads(done.stdout)


@pytest.mark.parametrize(
    ("spec", "mixing", "rho", "rounds"),
    [
        ("ring", "metropolis", 0.949253, 261),
        ("star", "best_constant", 0.882353, 111),
        ("grid", "fastest", 0.82439, 72),
        ("chain", "max_degree", 0.987190, 1072),
        ("hypercube", "metropolis", 0.6, 28),
    ],
)
def test_show_tells_the_rates_of_a_rule(spec, mixing, rho, rounds):
    found = told("topology", "show", spec, "--nodes", 16, "--mixing", mixing)
    keys = "nodes edges directed period degree_max doubly_stochastic rho slem gap exact_after"
    assert {*keys.split(), "rounds_to_1e-6"} <= found.keys()
    assert (found["rho"], found["slem"]) == pytest.approx((rho, rho), abs=6e-6)
    assert found["gap"] == pytest.approx(1 - rho, abs=6e-6)
    assert (found["mixing"], found["rounds_to_1e-6"]) == (mixing, rounds)
    assert found["doubly_stochastic"]


def test_compare_puts_topologies_side_by_side():
    ring, torus, one = told(
        "topology", "compare", "ring", "torus", "one_peer_exponential", "--nodes", 16, "--rounds", 6
    )
    assert [row["topology"] for row in (ring, torus, one)] == [
        "ring",
        "torus",
        "one_peer_exponential",
    ]
    assert (ring["rounds_to_1e-6"], torus["rounds_to_1e-6"], one["rounds_to_1e-6"]) == (261, 27, 4)
    assert (ring["messages_per_round"], torus["messages_per_round"]) == (2, 4)
    assert (ring["models_to_1e-6"], torus["models_to_1e-6"], one["models_to_1e-6"]) == (522, 108, 4)
    # 1 / c_t falls below 1e-6 after acosh(1e6) / acosh(1 / rho) = 44.5 rounds.
    assert (ring["accelerated"], one["accelerated"]) == (45, None)
    assert (ring["exact_after"], one["exact_after"]) == (None, 4)
    assert len(ring["errors"]) == 7
    assert ring["errors"][0] == 1
    assert one["errors"][3] > 0.1
    assert one["errors"][4] < 1e-12
    assert sorted(torus["errors"], reverse=True) == torus["errors"]


def test_compare_of_several_rules_names_them():
    rules = ["--mixing", "metropolis", "--mixing", "best_constant"]
    plain, best = told("topology", "compare", "star", "--nodes", 16, *rules)
    assert (plain["topology"], best["topology"]) == ("star metropolis", "star best_constant")
    assert (plain["rho"], best["rho"]) == pytest.approx((0.9375, 15 / 17), abs=1e-9)
    pushed = told("topology", "compare", "star", "--nodes", 16, "--mixing", "push")[0]
    assert pushed["errors"][-1] < 1e-6  # of the quotients
    unequal = told("topology", "compare", "el_local", "--nodes", 9, "--rounds", 3)[0]
    assert (unequal["rho"], unequal["messages_per_round"]) == (None, 4)


def test_compare_draws_and_prints_a_table(tmp_path):
    words = ["ring", "complete", "--nodes", 5, "--plot", tmp_path / "a.png"]
    done = p2pfl("topology", "compare", *words)
    assert done.stdout.splitlines()[0].split()[:3] == ["topology", "nodes", "rho"]
    assert f"drawn: {tmp_path / 'a.png'}" in done.stdout.replace("\n", "")
    assert (tmp_path / "a.png").read_bytes().startswith(b"\x89PNG")
    alone = told("topology", "compare", "complete", "--nodes", 1, "--rounds", 1)[0]
    assert alone["errors"] == [0, 0]


def test_topologies_are_those_of_the_table():
    found = {row["name"]: row for row in told("topologies")}
    assert found.keys() == TOPOLOGIES.keys()
    assert all(row["about"] for row in found.values())
    assert (found["ring"]["kind"], found["base"]["kind"], found["file"]["kind"]) == (
        "graph",
        "schedule",
        "file",
    )
    assert found["torus"]["arguments"] == ["rows", "cols"]
    assert "random_matching" in p2pfl("topologies").stdout


def test_algorithms_tell_what_they_need():
    found = {row["name"]: row for row in told("algorithms")}
    assert found.keys() == ALGORITHMS.keys()
    assert found["fedavg"]["message_bytes"] == {"per_parameter": 4, "besides": 4}
    assert found["gradient_tracking"]["message_bytes"] == {"per_parameter": 8, "besides": 0}
    assert found["choco"]["message_bytes"] is None
    assert found["fedavg"]["needs"]["graph"] == "complete"
    assert found["choco"]["needs"]["every_message"]
    assert (found["dpsgd"]["overlap"], found["d2"]["overlap"]) == (True, False)
    assert found["moniqua"]["needs"] is not None
    lines = p2pfl("algorithms").stdout.splitlines()
    d2 = next(line for line in lines if line.startswith("d2 "))
    assert "eigenvalues above -1/3" in d2
    assert re.search(r"4 d \+ 4 +shares of a mass", " ".join(lines))


@pytest.mark.parametrize(
    ("words", "part"),
    [
        (["show", "ring", "--nodes", 16, "--mixing", "fastset"], "did you mean 'fastest'"),
        (["show", "exponential", "--nodes", 9, "--mixing", "best_constant"], "both ways"),
        (["show", "ring", "--nodes", 99, "--mixing", "fastest"], "64 nodes, not 99"),
        (["compare", "ring", "torus"], "--nodes"),
        (["compare", "ring", "hypercube", "--nodes", 6], "n = 6"),
        (["compare", "ring", "--nodes", 5, "--plot", "no/where.png"], "no/where.png"),
        (["compare", "one_peer_exponential", "--nodes", 8, "--mixing", "fastest"], "both ways"),
        (["compare", "base:k=2", "--nodes", 6, "--mixing", "fastest"], "weights of their own"),
        (["show", "base:k=2", "--nodes", 6, "--draw", "base.png"], "changes from round to round"),
    ],
)
def test_mistakes_are_told_in_one_line(words, part, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = p2pfl("topology", *words)
    assert isinstance(done.exception, UserError)
    assert part in str(done.exception)
    assert "\n" not in str(done.exception)


@pytest.mark.parametrize("spec", ["ring", "equi_static:m=2", "u_equi_static:m=2"])
def test_what_stays_is_drawn(spec, tmp_path):
    done = p2pfl("topology", "show", spec, "--nodes", 8, "--draw", tmp_path / "it.png")
    assert done.exit_code == 0
    assert (tmp_path / "it.png").read_bytes().startswith(b"\x89PNG")


def test_a_mistake_ends_with_code_2():
    command = [sys.executable, "-m", "p2pfl", "topology", "compare", "rign", "--nodes", "4"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert (done.returncode, len(done.stderr.splitlines())) == (2, 1)
    assert "did you mean 'ring'" in done.stderr
