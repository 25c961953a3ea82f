"""Gradients weighed by examples: plain averaging then seeks the optimum over all examples."""

from __future__ import annotations

import pytest
import torch
from algorithm_cases import simulate
from torch import Tensor

from p2pfl.algorithm import Rows
from p2pfl.algorithms import dpsgd, exact_diffusion, gradient_tracking, kgt, push_diging, weighed
from p2pfl.errors import UserError
from p2pfl.experiment.experiment import Experiment
from p2pfl.learning import Quadratics
from p2pfl.learning.optim import adam, sgd
from p2pfl.topology import complete_graph, exponential_graph, metropolis, push, ring_graph

N, D = 6, 4
HELD = torch.tensor([2, 40, 5, 9, 1, 15])
MEAN = float(HELD.double().mean())


class Uneven(Quadratics):
    """Nodes that hold unlike numbers of examples."""

    def examples(self, nodes: Tensor) -> Tensor:
        return HELD[nodes]

    def pooled(self) -> Tensor:
        """Return the minimiser of the mean loss over all examples, ``[d]``."""
        share = HELD.double() / HELD.sum()
        a = torch.einsum("n,nij,nik->jk", share, self.a, self.a)
        b = torch.einsum("n,nij,ni->j", share, self.a, self.b)
        return torch.linalg.solve(a, b)


TASK = Uneven(N, D, seed=3)
LR = 0.03


@pytest.mark.parametrize(
    ("build", "graph", "rule"),
    [
        (gradient_tracking, ring_graph, metropolis()),
        (exact_diffusion, ring_graph, metropolis()),
        (lambda opt: kgt(opt), ring_graph, metropolis()),
        (push_diging, exponential_graph, push()),
        (dpsgd, complete_graph, metropolis()),
    ],
    ids=["gradient_tracking", "exact_diffusion", "kgt", "push_diging", "dpsgd"],
)
def test_exact_methods_come_to_the_optimum_over_all_examples(build, graph, rule):
    done = simulate(weighed(build(sgd(LR)), MEAN), TASK, graph(N), rule, 3000, 1)
    best = TASK.pooled()
    assert float((best - TASK.optimum()).norm()) > 0.3  # else nothing was tested
    torch.testing.assert_close(done.params, best.expand(N, D), rtol=0, atol=1e-9)
    plain = simulate(build(sgd(LR)), TASK, graph(N), rule, 3000, 1)
    torch.testing.assert_close(plain.params, TASK.optimum().expand(N, D), rtol=0, atol=1e-9)


def test_the_mean_moves_by_the_gradient_over_all_examples():
    a, nodes = weighed(dpsgd(sgd(LR)), MEAN), torch.arange(N)
    x = torch.randn(1, D, dtype=torch.float64).expand(N, D).contiguous()
    _, grads = TASK.grad(x, nodes, nodes * 0)
    state = a.step(a.init(x, Rows(nodes, HELD)), grads)
    pooled = (HELD.double().unsqueeze(1) / HELD.sum() * grads).sum(0)
    torch.testing.assert_close(a.model(state).mean(0), x[0] - LR * pooled)
    by, _ = a.factor(a.init(x, Rows(nodes, HELD)))
    torch.testing.assert_close(by.flatten(), -LR * HELD.double() / MEAN)


BASE = {"nodes": 6, "algorithm": "dpsgd", "topology": "ring"}


@pytest.mark.parametrize(
    ("tables", "words"),
    [
        ({"training": {"mean_examples": 0.0}}, "mean_examples = 0.0 is not a finite number"),
        ({"training": {"mean_examples": 9.0}, "optimiser": "adamw"}, "are as long whatever"),
        (
            {"training": {"mean_examples": 9.0}, "optimiser": {"name": "adam", "lr": 0.01}},
            "are as long whatever",
        ),
        (
            {
                "training": {"mean_examples": 9.0},
                "algorithm": "push_sum:weight=examples",
            },
            "so does algorithm.name = 'push_sum'",
        ),
        (
            {"training": {"mean_examples": 9.0}, "algorithm": "fedavg", "topology": "complete"},
            "weight = 'uniform'",
        ),
    ],
)
def test_what_has_no_effect_or_twice_is_refused(tables, words):
    with pytest.raises(UserError, match=words):
        Experiment.from_dict(BASE | tables)


@pytest.mark.parametrize(
    "more",
    [
        {"algorithm": "fedavg:weight=uniform", "topology": "complete"},
        {"optimiser": {"name": "sgd", "lr": 0.1, "momentum": 0.9, "weight_decay": 0.1}},
        {"pace": {"overlap": True}},
        {"training": {"mean_examples": 9.0, "share": ["1.*"], "proximal": 0.1}},
    ],
)
def test_what_goes_with_it(more):
    experiment = Experiment.from_dict({**BASE, "training": {"mean_examples": 9.0}} | more)
    assert experiment.training.mean_examples == 9.0


def test_of_adam_the_scale_is_lost():
    x, rows = torch.zeros(2, 3, dtype=torch.float64), Rows(torch.arange(2), torch.tensor([1, 9]))
    a = weighed(dpsgd(adam(0.1)), 5.0)
    after = a.model(a.step(a.init(x, rows), torch.ones_like(x)))
    torch.testing.assert_close(after[0], after[1], rtol=1e-6, atol=0)
