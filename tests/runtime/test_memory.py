from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from runtime_cases import CASES, make

from p2pfl.algorithms import powergossip
from p2pfl.errors import UserError
from p2pfl.learning import Quadratics
from p2pfl.learning.optim import adam, sgd
from p2pfl.learning.spec import Spec
from p2pfl.learning.tree import leaves
from p2pfl.peer.plan import Pace
from p2pfl.runtime import memory
from p2pfl.runtime.memory import check, needed
from p2pfl.runtime.simulate import Simulator
from p2pfl.topology import el_local
from p2pfl.topology.schedule import in_degrees

D, N = 100, 6
MATRIX = Spec(("weight",), ((20, 5),), ("float64",))


def case(name, opt):
    chosen = CASES[name]._replace(opt=opt)
    if name == "powergossip":  # which must know what its parameters are
        chosen = chosen._replace(build=lambda opt: powergossip(opt, MATRIX))
    return make(chosen, Pace(1), task=Quadratics(N, D))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("opt", [sgd(0.1), adam()])
def test_the_state_foreseen_is_the_state_held(name, opt):
    setup = case(name, opt)
    state = Simulator(setup).state
    assert needed(setup, N).state == sum(leaf.nbytes for leaf in leaves(state))


def test_what_is_heard():
    model = N * D * 8
    assert needed(case("dpsgd ring", sgd(0.1)), N).memory == 0  # a message is the model itself
    assert needed(case("choco top_k", sgd(0.1)), N).memory == 4 * model
    # The model of push_sum is a quotient, worked out where it is measured.
    assert needed(case("push_sum directed", sgd(0.1)), N).memory == model
    assert needed(case("dpsgd ring", sgd(0.1)), N, twice=True).memory == model
    whole = case("dpsgd ring", sgd(0.1))
    whole = whole.__class__(
        **{**vars(whole), "algorithm": whole.algorithm._replace(columnwise=False)}
    )
    assert needed(whole, N).memory == model  # not mixed in place
    assert needed(case("dpsgd ring", sgd(0.1)), 3).state == model // 2


@pytest.mark.parametrize("emulated", [False, True])
def test_who_trains_and_exchanges_at_once_holds_three_states(emulated):
    plain = case("dpsgd ring", adam())
    overlapped = replace(plain, pace=Pace(2, overlap=True))
    more = needed(overlapped, N, emulated).total - needed(plain, N, emulated).total
    assert more == 2 * needed(plain, N).state


@pytest.mark.parametrize("emulated", [False, True])
def test_a_rule_lays_some_columns_of_all_neighbours_side_by_side(emulated):
    plain = case("dpsgd ring", sgd(0.1))
    needs = plain.algorithm.needs._replace(rule="the median of 3")
    ruled = replace(plain, algorithm=plain.algorithm._replace(needs=needs))
    more = needed(ruled, N, emulated).total - needed(plain, N, emulated).total
    senders, rows = 2 + 1, 1 if emulated else N
    assert more == memory.SORTED * torch.get_num_threads() * senders * rows * D * 8


def test_the_degree_of_a_topology_that_changes_is_the_largest_of_some_rounds():
    setup = replace(case("dpsgd ring", sgd(0.1)), topology=el_local(40, 2))
    degrees = [int(in_degrees(setup.topology.links(round)).max()) for round in range(8)]
    assert memory._degree(setup) == max(degrees) > degrees[0]


def test_what_cannot_fit_is_refused(monkeypatch):
    need = needed(case("dpsgd ring", sgd(0.1)), N)
    check(need)
    monkeypatch.setattr(memory, "free", lambda device: need.total - 1)
    with pytest.raises(UserError, match=r"this run needs .* are free: take fewer nodes"):
        check(needed(case("dpsgd ring", sgd(0.1)), N))


def test_a_container_has_less_than_the_machine(monkeypatch, tmp_path):
    machine = memory.free(torch.device("cpu"))
    assert machine > 1 << 20
    (tmp_path / "memory.max").write_text("5000000\n")
    (tmp_path / "memory.current").write_text("2500000\n")
    (tmp_path / "memory.stat").write_text("anon 1500000\nfile 600000\nshmem 100000\n")
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert memory.free(torch.device("cpu")) == 3_000_000
    (tmp_path / "memory.max").write_text("max\n")
    assert memory.free(torch.device("cpu")) > 1 << 20
