"""Simulations shared out among ranks, against the same ones in a single process."""

from __future__ import annotations

import json
import multiprocessing
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from datetime import timedelta
from functools import partial
from pathlib import Path

import networkx as nx
import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from runtime_cases import CASES, RULES, STEPS, Case, N, flat, make, one_peer_exponential
from safetensors.torch import load_file, save_file

import p2pfl
from p2pfl.algorithms import dpsgd
from p2pfl.errors import P2pflError, RunError
from p2pfl.learning import Quadratics
from p2pfl.learning.optim import sgd
from p2pfl.learning.tree import leaves
from p2pfl.peer.plan import Pace
from p2pfl.peer.stopping import target
from p2pfl.results.runs import read_run
from p2pfl.runtime import arena, distributed, exchange
from p2pfl.runtime.distributed import Distributed
from p2pfl.runtime.parting import exchanging
from p2pfl.runtime.ranks import Ranks
from p2pfl.runtime.setup import Setup
from p2pfl.runtime.simulate import Simulator
from p2pfl.topology import complete_graph

sys.path.append(str(Path(__file__).parents[1] / "algorithms"))
from algorithm_cases import PLAIN

# torch is loaded once, and not in every process.
multiprocessing.get_context("forkserver").set_forkserver_preload(["p2pfl.runtime.distributed"])

PATIENCE = 60  # seconds, after which a hang is taken for one
MANY = 70  # nodes, so that matrices are sparse


def sparse(n: int) -> nx.Graph:
    return nx.random_regular_graph(4, n, seed=1)


def median(opt):
    """An algorithm which is not linear, and takes its rows whole."""

    def receive(s, inbox):
        block, mask = inbox.gather(inbox.heard.x)
        return s._replace(x=block.masked_fill(~mask.unsqueeze(-1), torch.nan).nanmedian(1).values)

    return dpsgd(opt)._replace(receive=receive, columnwise=False)


RING, ALL = CASES["dpsgd ring"], CASES["dpsgd complete"]

# Where neighbours are sent different messages, ranks are refused; see test_addressed_runs.
SHARED_OUT = [n for n in CASES if not make(n, Pace(1)).algorithm.needs.addressed]

RUNS: dict[str, Callable[[], Setup]] = {
    **{name: (lambda name=name: make(name, Pace(4))) for name in SHARED_OUT},
    "unequal steps": lambda: make("fedavg", Pace(4), steps=STEPS["unequal"]),
    "seldom": lambda: make("gossip", Pace(5, evaluate_every=2), steps=STEPS["three"]),
    "gossip complete": lambda: make(CASES["gossip"]._replace(graph=ALL.graph), Pace(4)),
    "sample": lambda: replace(make("dpsgd ring", Pace(3)), sample=torch.tensor([0, 1])),
    "sparse": lambda: make(RING._replace(graph=sparse), Pace(3), MANY),
    "sparse gossip": lambda: make(CASES["gossip"]._replace(graph=sparse), Pace(3), MANY),
    "changing": lambda: make("dpsgd directed", Pace(4), 8, topology=one_peer_exponential(8)),
    "many blocks": lambda: make("push_sum directed", Pace(3), task=Quadratics(N, 150, 0.1, seed=3)),
    "blocks of all": lambda: make("fedavg", Pace(3), task=Quadratics(N, 150, 0.1, seed=3)),
    "median": lambda: make(RING._replace(build=median), Pace(3)),
    "median of all": lambda: make(ALL._replace(build=median), Pace(3)),
    "overlap": lambda: make("dpsgd ring", Pace(4, overlap=True), steps=STEPS["unequal"]),
    "overlap of all": lambda: make("fedavg adam", Pace(4, overlap=True)),
    "overlap of masses": lambda: make("push_sum directed", Pace(4, overlap=True)),
    "stopping": lambda: make("dpsgd ring", Pace(200, stop=target(4.5, "train_loss"), width=3)),
    "divergence": lambda: make(RING._replace(opt=sgd(50.0)), Pace(2000)),
    "too few": lambda: make("dpsgd complete", Pace(2), n=1),
}


def drive(setup: Setup, ranks: Ranks) -> tuple[dict, torch.Tensor]:
    """Run to the end; return what came of it, and everybody's models."""
    rows, error, reason, params, size = [], "", "", torch.zeros(0), 0
    try:
        simulator = Simulator(setup, ranks)
        size = sum(leaf.nbytes for leaf in leaves(simulator.state))
        rows = flat(list(simulator.rounds()))
        reason, params = simulator.ending.reason, ranks.gather(simulator.params.contiguous())
    except P2pflError as found:
        error = f"{type(found).__name__}: {found}"
    told = {"rows": [row._replace(wall_s=0) for row in rows], "error": error, "reason": reason}
    return {**told, "bytes": size}, params


@pytest.fixture(autouse=True)
def narrow_blocks(monkeypatch):
    monkeypatch.setattr(exchange, "cache_bytes", lambda device: 0)  # so LEAST columns at a time


def joined(
    rank: int, size: int, folder: str, work: Callable[[int, Path], None], near: bool, place: str
) -> None:
    torch.set_num_threads(1)
    if not near:  # as on several machines
        distributed.open_arena = lambda rank, size: None
    arena.SHARED = Path(folder) / place
    exchange.cache_bytes = lambda device: rank  # type: ignore[assignment]
    store = f"file://{folder}/store"
    patience = timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", store, patience, size, rank)
    work(rank, Path(folder))
    dist.destroy_process_group()


def spawned(
    size: int, folder: Path, work: Callable[[int, Path], None], near: bool = True, place: str = ""
) -> None:
    """Do some work on every rank; what goes wrong on one ends them all."""
    arguments = (size, str(folder), work, near, place)
    context = mp.start_processes(joined, arguments, size, join=False, start_method="forkserver")
    try:
        until = time.monotonic() + PATIENCE
        while not context.join(1):  # which returns whenever one of them has ended
            assert time.monotonic() < until, "a rank hangs"
    finally:
        for process in context.processes:
            process.kill()


def run_all(rank: int, folder: Path) -> None:
    told, models = {}, {}
    for name, build in RUNS.items():
        told[name], models[name] = drive(build(), Distributed())
    (folder / f"{rank}.json").write_text(json.dumps(told))
    save_file(models, folder / f"{rank}.safetensors")


@pytest.fixture(scope="module", params=[(2, True), (3, False)], ids=str)
def shared_out(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    size, near = request.param
    spawned(size, folder, run_all, near)
    return [
        (json.loads((folder / f"{r}.json").read_text()), load_file(folder / f"{r}.safetensors"))
        for r in range(size)
    ]


@pytest.mark.parametrize("name", [name for name in RUNS if name != "too few"])
def test_every_rank_comes_to_the_numbers_of_one_process(shared_out, name):
    expected, params = drive(RUNS[name](), Ranks())
    for told, models in shared_out:
        assert told[name]["error"] == expected["error"]
        assert told[name]["reason"] == expected["reason"]
        found = torch.tensor(told[name]["rows"], dtype=torch.float64)
        wanted = torch.tensor(expected["rows"], dtype=torch.float64)
        torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-12, equal_nan=True)
        torch.testing.assert_close(models[name], params, rtol=1e-10, atol=1e-12)


# Every algorithm that hears anybody, where all hear all: there no rows travel unless it asks.
ALIKE = {
    name: Case(build, complete_graph, RULES[needs.weights])
    for name, build in PLAIN.items()
    if not (needs := build(sgd(0.1)).needs).addressed and needs.weights != "none"
}


def run_alike(rank: int, folder: Path) -> None:
    made = {name: drive(alike(name), Distributed())[1] for name in ALIKE}
    save_file(made, folder / f"{rank}.safetensors")


def alike(name: str) -> Setup:
    return make(ALIKE[name], Pace(2), 7)  # of which two ranks hold unequal numbers


def test_where_all_hear_all_every_algorithm_comes_to_the_models_of_one_process(tmp_path):
    spawned(2, tmp_path, run_alike)
    for rank in range(2):
        models = load_file(tmp_path / f"{rank}.safetensors")
        for name in ALIKE:
            told, params = drive(alike(name), Ranks())
            assert not told["error"]
            torch.testing.assert_close(models[name], params, rtol=1e-10, atol=1e-12, msg=name)


def test_the_cases_end_as_they_are_meant_to():
    assert drive(RUNS["divergence"](), Ranks())[0]["error"].startswith("RunError: node")
    assert drive(RUNS["stopping"](), Ranks())[0]["reason"] == "converged"


def test_fewer_nodes_than_ranks_are_refused_everywhere(shared_out):
    wrong = f"UserError: nodes = 1: expected at least one for each of {len(shared_out)} ranks"
    assert [told["too few"]["error"] for told, _ in shared_out] == [wrong] * len(shared_out)


def test_the_state_of_a_rank_falls_with_the_number_of_ranks(shared_out):
    whole = drive(RUNS["choco top_k"](), Ranks())[0]["bytes"]
    assert [told["choco top_k"]["bytes"] for told, _ in shared_out] == [
        whole / len(shared_out)
    ] * len(shared_out)


def check_fields(rank: int, folder: Path, near: bool, by_columns: bool, room: int) -> None:
    ranks, n = Distributed(), MANY
    assert (ranks._arena is not None) is near
    if room and ranks._arena:
        ranks._arena.bytes = room
    setup = make(RING._replace(graph=sparse), Pace(1), n)
    mine = ranks.nodes(n)
    around = ranks.neighbourhood(setup.weights(0), by_columns)
    blocks = [torch.arange(n).unsqueeze(1) * 3, torch.arange(2 * n).view(n, 2).bfloat16() / 8]
    blocks.append(torch.arange(n) % 3 == 0)
    fetched = around.fetch(tuple(block[mine] for block in blocks))()
    dense = setup.weights(0).to_dense()
    senders = (dense[mine] != 0).any(0).nonzero().flatten()
    if by_columns and near:
        senders = torch.arange(senders[0], senders[-1] + 1)  # nothing travels
    else:
        assert len(senders) < n
    assert torch.equal(senders[around.own], mine)
    assert torch.equal(around.weights.to_dense(), dense[mine][:, senders])
    for block, got in zip(blocks, fetched, strict=True):
        assert torch.equal(got, block[senders])
        assert torch.equal(ranks.gather(block[mine]), block)
    assert float(ranks.total(torch.tensor(rank + 0.5))) == 4.5


@pytest.mark.parametrize(
    ("near", "by_columns", "room"),
    [
        pytest.param(True, False, 0, id="whole rows"),
        pytest.param(False, True, 0, id="far"),
        pytest.param(True, True, 0, id="shared memory"),
        pytest.param(True, True, 64, id="shared memory too small"),
    ],
)
def test_fields_of_every_type_travel_and_only_the_rows_that_are_needed(
    near, by_columns, room, tmp_path
):
    check = partial(check_fields, near=near, by_columns=by_columns, room=room)
    spawned(3, tmp_path, check, near)


def check_memory(rank: int, folder: Path) -> None:
    opened = arena.open_arena(rank, dist.get_world_size())
    dist.barrier()
    assert (opened is not None) is arena.SHARED.exists()
    assert not list(folder.glob("p2pfl-*"))


@pytest.mark.parametrize("place", ["", "nowhere"])
def test_shared_memory_leaves_no_files_and_is_done_without_where_there_is_none(place, tmp_path):
    spawned(2, tmp_path, check_memory, place=place)


def leave_early(rank: int, folder: Path) -> None:
    if rank == 0:
        with pytest.raises(RunError, match=r"^another rank has gone: [A-Z]"):
            Distributed().total(torch.zeros(1))


def test_a_rank_that_leaves_does_not_keep_the_others_waiting(tmp_path):
    spawned(2, tmp_path, leave_early)


def test_other_errors_in_an_exchange_come_as_they_are():
    with pytest.raises(RuntimeError, match="shapes"), exchanging():
        raise RuntimeError("shapes differ")


def torchrun(*words: str) -> subprocess.CompletedProcess:
    """Run an experiment on two ranks, as the command line does."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["-m", "p2pfl", "run", "digits", "--quiet", *words]
    return subprocess.run(command, capture_output=True, text=True, timeout=PATIENCE, check=False)


@pytest.mark.processes
def test_torchrun_leaves_what_one_process_leaves(tmp_path):
    changes = ["pace.rounds=3", "training.dtype=float64", "pace.local_steps=2"]
    words = [word for change in changes for word in ("--set", change)]
    done = torchrun(*words, "--out", str(tmp_path / "two"))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("results in") == 1
    alone = p2pfl.run("digits", out=tmp_path / "one", changes=changes)
    metrics = [read_run(tmp_path / name).metrics for name in ("one", "two")]
    for name in set(metrics[0]) - {"wall_s"}:
        np.testing.assert_allclose(metrics[1][name], metrics[0][name], 1e-9, 1e-12, err_msg=name)
    summary = read_run(tmp_path / "two").summary
    for name in ("alone", "pooled", "eval_acc_mean_model", "node_updates"):
        assert summary[name] == pytest.approx(alone.summary[name], rel=1e-6)
    saved = sorted(path.name for path in (tmp_path / "one").rglob("*.safetensors"))
    assert saved == sorted(path.name for path in (tmp_path / "two").rglob("*.safetensors"))
    x = torch.rand(4, 64)
    for node in (None, 7):
        one, two = (p2pfl.load(tmp_path / name, node=node)(x) for name in ("one", "two"))
        torch.testing.assert_close(two, one, rtol=1e-5, atol=1e-6)


@pytest.mark.processes
@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--on", "emulate"], "p2pfl: --on emulate: torchrun spreads simulations only"),
        (["--set", "optimiser.lr=1e30"], "p2pfl: node 0 diverged in round 0"),
    ],
)
def test_what_goes_wrong_is_told_once_and_ends_all_ranks(words, message, tmp_path):
    done = torchrun(*words, "--out", str(tmp_path / "run"))
    assert done.returncode == 1  # torchrun's own, whatever that of the ranks
    assert done.stderr.count("p2pfl: ") == done.stderr.count(message) == 1
    if "--set" in words:
        assert read_run(tmp_path / "run").summary["status"] == "failed"
