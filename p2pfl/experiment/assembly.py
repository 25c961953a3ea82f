"""From an experiment to what a runtime is given."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from p2pfl import rng
from p2pfl.experiment.pairing import suited
from p2pfl.experiment.sections import Timer
from p2pfl.experiment.wrapping import build_algorithm
from p2pfl.learning.task import ModelTask
from p2pfl.peer.gossiper import Tempo
from p2pfl.peer.plan import Pace
from p2pfl.runtime.setup import Setup
from p2pfl.topology.mixing import weights

if TYPE_CHECKING:
    from p2pfl.experiment.experiment import Experiment

_MEASURED = 16  # tells the lots of who is measured from other lots below the same keys


def build_setup(experiment: Experiment, task: ModelTask, pooled: ModelTask | None) -> Setup:
    """Return what a runtime needs to run an experiment on a task.

    Args:
        experiment: what is run.
        task: of all nodes, or of one.
        pooled: what the mean model is measured on while the run goes on, if at all.
    """
    topology, mixing = experiment.topology, suited(experiment.mixing, experiment.algorithm.needs)

    @lru_cache(maxsize=topology.period or 1)
    def matrix(round: int) -> Tensor:
        return weights(topology.links(round), mixing).to(task.device)

    whole = experiment.sections, experiment.nodes, experiment.attackers, experiment.seed
    algorithm = build_algorithm(*whole, task)
    # Who keeps something of every neighbour has no use for others in place of those that are gone.
    follows = experiment.membership and not (algorithm.needs.addressed and algorithm.needs.static)
    return Setup(
        algorithm,
        task,
        topology,
        mixing,
        _pace(experiment),
        lambda nodes: experiment.local_steps(task.examples(nodes)),
        lambda round: matrix(round % topology.period if topology.period else round),
        measured(experiment),
        pooled,
        experiment.among if follows else None,
        experiment.churn,
        experiment.membership,
        torch.tensor(experiment.attackers.who, dtype=torch.int64),
    )


def _pace(experiment: Experiment) -> Pace | Tempo:
    pace, every = experiment.pace, experiment.evaluation.every
    if isinstance(pace, Timer):
        return Tempo(pace.period, pace.ticks, evaluate_every=every, seed=experiment.seed)
    topology = experiment.topology
    width = max(topology.reach(), 1) if pace.stop else 1
    return Pace(
        pace.rounds,
        patience=pace.patience,
        seconds=pace.seconds,
        evaluate_every=every,
        stop=pace.stop,
        width=width,
        overlap=pace.overlap,
        train_every=pace.train_every,
        floods=lambda round: topology.floods(round, width),
    )


def measured(experiment: Experiment) -> Tensor | None:
    """Return the nodes which are measured, ascending; None: all. Attackers never are."""
    wanted, nodes = experiment.evaluation.nodes, torch.tensor(experiment.honest)
    if isinstance(wanted, str) or wanted >= len(nodes):
        return nodes if len(nodes) < experiment.nodes else None
    lots = rng.uniform(rng.fold(rng.keys(experiment.seed, nodes), _MEASURED), 1).squeeze(1)
    return nodes[lots.argsort()[:wanted]].sort().values
