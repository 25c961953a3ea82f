"""How soon peer processes are at one again after a network was cut in two, or with a late one.

    python scripts/benchmarks/reunions.py [--what split] [--nodes 16] [--runs 3] [--seed 0]
                                          [--topology ring] [--cut 30]

``--what split`` cuts the network into two halves for some seconds. Measured are when the last peer
sees everybody alive again, counted from the healing; how long the longest round of either half
was, which must go on by itself; how far apart models are, as consensus distance, 20 to 40
rounds after the healing, in proportion to a run in which nothing happens, over the same rounds; and
after how many rounds that proportion first is 1.1 or less.

``--what late`` lets one peer join in the middle. Measured is its accuracy three rounds after its
first less the mean of the others in the same round, and when the last of them knew of it, counted
from the end of its first round.

Data are scikit-learn's digits, the same to everybody in distribution.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe
from rich.console import Console
from rich.table import Table

import p2pfl
from p2pfl.results.runs import Result

BEFORE, AFTER = 8.0, 15.0  # seconds of training before and after what happens
SETTLED, WINDOW = 20, 20  # rounds after which peers are at one again, and over which it is judged
ROUNDING = 1e-6  # a consensus distance that is none
AT_ONE = 1.1  # times as far apart as without a fault counts as at one again
JOINED = 3  # rounds after which who comes late is as good as the others

Figures = dict[str, float]


def main() -> None:
    """Measure, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--what", choices=("split", "late"), default="split")
    parser.add_argument("--nodes", type=int, default=16)
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--topology", default="ring")
    parser.add_argument("--cut", type=float, default=30.0, help="seconds the network is cut")
    given = parser.parse_args()
    found: list[Figures] = []
    with tempfile.TemporaryDirectory() as scratch:
        for number in range(given.runs):
            folder, seed = Path(scratch) / str(number), given.seed + number
            found.append((split if given.what == "split" else late)(given, folder, seed))
            print(f"run {number}: {found[-1]}", file=sys.stderr)
    show(found, given)


def split(given: argparse.Namespace, folder: Path, seed: int) -> Figures:
    """Cut the network in two and heal it."""
    half = list(range(given.nodes // 2))
    text = f'[[event]]\nat = "{BEFORE}s"\npartition = {half}\nfor = "{given.cut}s"\n'
    seconds = BEFORE + given.cut + AFTER
    whole = run(given, folder / "whole", seed, seconds)
    torn = run(given, folder / "torn", seed, seconds, text)
    healed = BEFORE + given.cut
    wall, rounds = torn.metrics["wall_s"], torn.metrics["round"]
    alive = [at - healed for _, at in noticed(torn, "alive") if at > healed]
    # One half may be some rounds ahead of the other.
    last = int(rounds[wall <= healed].max())
    # Where all hear all there is none but by rounding, neither with a cut nor without.
    usual = max(distance(whole, last + SETTLED, WINDOW), ROUNDING)
    gaps = [
        np.diff(wall[(torn.metrics["node"] == node) & (wall < healed) & (wall > BEFORE)])
        for node in range(given.nodes)
    ]
    apart = max(distance(torn, last + SETTLED, WINDOW), ROUNDING)
    after = (gone for gone in range(1000) if distance(torn, last + gone, 1) <= AT_ONE * usual)
    return {
        "all see all, s after the healing": max(alive),
        "longest round while cut, s": float(max(gap.max() for gap in gaps)),
        "distance": apart,
        "distance undisturbed": usual,
        "distance / undisturbed": apart / usual,
        "rounds until 1.1 of it": float(next(after, np.nan)),
    }


def distance(result: Result, first: int, count: int) -> float:
    """Return how far apart models are, on average over so many rounds from one on."""
    rounds, far = result.metrics["round"], result.metrics["consensus_distance"]
    there = (rounds >= first) & (rounds < first + count) & ~np.isnan(far)
    return float(far[there].mean()) if there.any() else np.nan


def late(given: argparse.Namespace, folder: Path, seed: int) -> Figures:
    """Let the last peer come late."""
    who = given.nodes - 1
    text = f'[[event]]\nat = "{BEFORE}s"\njoin = [{who}]\n'
    result = run(given, folder / "late", seed, BEFORE + AFTER, text)
    metrics = result.metrics
    own = metrics["node"] == who
    first = int(metrics["round"][own].min())
    at = (metrics["round"] == first + JOINED) & ~np.isnan(metrics["eval_acc"])
    others = statistics.mean(metrics["eval_acc"][at & ~own])
    began = float(metrics["wall_s"][own].min())
    known = [at for peer, at in noticed(result, "alive") if peer == who]
    gained = float(metrics["eval_acc"][at & own][0]) - others
    return {
        "accuracy less the others', points": 100 * gained,
        "known to all, s after its first round": max(known) - began,
    }


def run(
    given: argparse.Namespace, folder: Path, seed: int, seconds: float, script: str = ""
) -> Result:
    """Let all peers train, while something happens or nothing."""
    tables: dict[str, Any] = {
        "nodes": given.nodes,
        "seed": seed,
        "data": "digits",
        "model": {"name": "mlp", "hidden": [64]},
        "optimiser": {"name": "sgd", "lr": 0.05},
        "algorithm": "dpsgd",
        "topology": given.topology,
        "pace": {"rounds": 1_000_000, "seconds": seconds, "local_steps": 4},
        "evaluation": {"every": 1, "nodes": "all"},
        "output": {"models": "none"},
    }
    if script:
        folder.parent.mkdir(exist_ok=True, parents=True)
        path = folder.with_suffix(".toml")
        path.write_text(script)
        tables["churn"] = {"name": "script", "path": str(path)}
    result = p2pfl.run(tables, on="local", out=folder)
    if result.summary["status"] != "finished":
        sys.exit(f"a run was {result.summary['status']}: {result.summary.get('error')}")
    return result


def noticed(result: Result, status: str) -> list[tuple[int, float]]:
    """Return whom peers have noticed to be so, and after how many seconds of training."""
    assert result.folder is not None
    found = []
    for file in result.folder.glob("peers/*/events.jsonl"):
        told = [json.loads(line) for line in file.open()]
        began = next(one["wall_s"] for one in told if one["event"] == "training")
        found += [
            (one["peer"], one["wall_s"] - began)
            for one in told
            if one["event"] == "noticed" and one["status"] == status
        ]
    return found


def show(found: list[Figures], given: argparse.Namespace) -> None:
    """Print the table, and on what machine it was measured."""
    title = f"{given.what}: {given.nodes} processes, {given.topology}, {len(found)} runs"
    table = Table("", "median", "worst", title=title)
    for name in found[0]:
        values = [one[name] for one in found]
        worst = min(values) if "accuracy" in name else max(values)
        table.add_row(name, f"{statistics.median(values):.3g}", f"{worst:.3g}")
    Console(width=100).print(table)
    Console(width=100).print(describe(), markup=False, highlight=False)


if __name__ == "__main__":
    main()
