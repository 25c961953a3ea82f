"""UBAR: near models first, and of those the ones that are no worse."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from algorithm_cases import blocks, graphs, matrix, own_taste, setup, simulate
from hypothesis import given, settings
from hypothesis import strategies as st

from p2pfl.algorithm import Inbox, Rows
from p2pfl.algorithms import ubar
from p2pfl.attacks import ATTACKS, hostile
from p2pfl.errors import UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.learning import Quadratics
from p2pfl.learning.judging import judge
from p2pfl.learning.optim import sgd
from p2pfl.runtime.emulate import Emulator
from p2pfl.runtime.network import NetworkModel
from p2pfl.runtime.simulate import Simulator
from p2pfl.topology import complete_graph, metropolis, random_regular_graph

N = 10


def by_hand(state, w, taste, rho, alpha):
    """Return what the paper makes of the models, row by row."""
    (x, _, nodes, steps), after = state, []
    for i in range(len(x)):
        around = [j for j in range(len(x)) if w[i, j] and j != i]
        kept = int(rho * len(around) + 1e-9)
        near = sorted(around, key=lambda j: float((x[j] - x[i]).norm()))[:kept]
        if not near:
            after.append(x[i])
            continue
        loss = {j: float(taste(x[None, [j]], nodes[[i]], steps[[i]])) for j in [i, *near]}
        good = [j for j in near if loss[j] <= loss[i]] or near[:1]
        after.append(alpha * x[i] + (1 - alpha) * x[good].mean(0))
    return torch.stack(after)


@pytest.mark.parametrize(("rho", "alpha"), [(0.4, 0.5), (0.7, 0.2), (1.0, 0.0)])
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_two_stages_as_written(rho, alpha, data):
    graph = data.draw(graphs(9))
    x, rows, grads = data.draw(blocks(len(graph)))
    a, w = ubar(sgd(0.1), own_taste, rho, alpha), matrix(graph)
    state = a.init(x, rows)
    for g in grads[:2]:
        state = a.step(state, g)
        expected = by_hand(state, w, own_taste, rho, alpha)
        state = a.receive(state, Inbox(w, a.send(state), torch.arange(len(x))))
        torch.testing.assert_close(state.x, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("rho", "models"), [(0.4, 4), (0.5, 3), (1 / 3, 4), (1.0, 2), (0.3, 5)])
def test_it_says_how_many_models_one_of_which_is_kept(rho, models):
    assert ubar(sgd(0.1), own_taste, rho).needs.models == models
    for heard in (models - 1, models):
        x = torch.randn(heard, 2, dtype=torch.float64)
        a, w = ubar(sgd(0.1), own_taste, rho), torch.full((heard, heard), 1 / heard)
        state = a.init(x, Rows(torch.arange(heard), torch.ones(heard).long()))
        after = a.receive(state, Inbox(w, a.send(state), torch.arange(heard)))
        assert torch.equal(after.x, x) is (heard < models)


def test_models_are_judged_by_the_loss_of_the_step_that_comes_next():
    seen = []

    def taste(models, nodes, steps):
        seen.append((models.shape, nodes.tolist(), steps.tolist()))
        return own_taste(models, nodes, steps)

    task = Quadratics(N, 5, seed=1)
    simulate(ubar(sgd(0.1), taste), task, complete_graph(N), metropolis(), 2, 3)
    assert [steps for _, _, steps in seen] == [[3] * N, [6] * N]
    assert seen[0][0] == (N, 1 + 3, 5)  # one's own, and 0.4 of nine, rounded down
    assert seen[0][1] == list(range(N))


def test_a_task_judges_each_model_by_the_loss_of_its_hearer():
    task = Quadratics(N, 5, noise=0.1, seed=1)
    models, nodes = torch.randn(3, 2, 5, dtype=torch.float64), torch.tensor([4, 1, 7])
    losses = judge(task)(models, nodes, torch.tensor([0, 5, 2]))
    for i in range(3):
        for j in range(2):
            miss = task.a[nodes[i]] @ models[i, j] - task.b[nodes[i]]
            assert float(losses[i, j]) == pytest.approx(float(miss.square().sum() / 2))


@pytest.mark.parametrize("attack", ["sign_flip", "gaussian", "ipm"])
def test_attackers_do_not_keep_it_from_the_optimum_and_the_emulator_says_the_same(attack):
    task = Quadratics(N, 5, seed=1)
    task.b = task.b * 0 + 3.0  # alike but for what they see of it
    graph = random_regular_graph(N, degree=6, seed=2)
    lies = ATTACKS[attack](10.0) if attack != "ipm" else ATTACKS[attack](epsilon=10.0)
    a = hostile(ubar(sgd(0.1), judge(task)), lies, {0, 5}, seed=1)
    run = setup(a, task, graph, metropolis(), 40, 1)
    run = dataclasses.replace(run, attackers=torch.tensor([0, 5]))
    simulator = Simulator(run)
    for _ in simulator.rounds():
        pass
    emulator = Emulator(run, NetworkModel(latency=0.1, compute=1.0))
    for _ in emulator.rounds():
        pass
    torch.testing.assert_close(emulator.ending.params, simulator.params, rtol=1e-9, atol=1e-9)
    honest = [k for k in range(N) if k not in (0, 5)]
    best = task.evaluate(task.optimum()[None], torch.tensor([0])).loss
    begun = task.evaluate(task.init(torch.tensor([0])), torch.tensor([0])).loss
    reached = task.evaluate(simulator.params[honest], torch.tensor(honest)).loss
    assert float((reached - best).max()) < 0.1 * float(begun - best)


BASE = {"nodes": 8, "data": "digits", "pace": {"rounds": 3, "local_steps": 2}}


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"algorithm": "ubar:rho=0"}, "rho must be"),
        ({"algorithm": "ubar:rho=1.5"}, "rho must be"),
        ({"algorithm": "ubar:alpha=-1.0"}, "alpha must be"),
        ({"algorithm": {"name": "ubar", "judge": "me"}}, "algorithm.judge is unknown"),
        ({"algorithm": "ubar", "topology": "ring"}, "needs 4 models"),
        ({"algorithm": "ubar", "pace": {"name": "timer"}}, "needs 4 models at once"),
        (
            {
                "algorithm": "ubar:rho=0.8",
                "topology": "complete",
                "attackers": {"nodes": [1, 2, 4], "attack": "sign_flip"},
            },
            "keeps 5 of the 7 models that node 0 hears, and 3 of them attack",
        ),
        ({"algorithm": "ubar", "training": {"share": ["1.*"]}}, "needs whole models"),
    ],
)
def test_what_cannot_be_is_refused(tables, words):
    with pytest.raises(UserError, match=words):
        Experiment.from_dict(BASE | tables)


def test_as_many_attackers_as_it_reckons_with_are_not():
    attackers = {"nodes": [1, 2, 4], "attack": "sign_flip"}
    tables = {"algorithm": "ubar:rho=0.5", "topology": "complete", "attackers": attackers}
    assert Experiment.from_dict(BASE | tables).algorithm.needs.models == 3
