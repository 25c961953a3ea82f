"""What a run has come to: its models, the mean model, and what it is to be compared with."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl.algorithms import local
from p2pfl.data.batches import batch_sizes
from p2pfl.data.shards import Federation, Shards
from p2pfl.data.statistics import Affine
from p2pfl.experiment.experiment import Experiment
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.task import ModelTask
from p2pfl.learning.tree import wide
from p2pfl.peer.plan import Pace
from p2pfl.results.predictor import Predictor, Signature
from p2pfl.results.record import Recorder
from p2pfl.results.saved import save_tensors
from p2pfl.runtime.conserved import mean_drift
from p2pfl.runtime.exchange import squared_distances
from p2pfl.runtime.ranks import Ranks
from p2pfl.runtime.setup import Ending, Setup
from p2pfl.runtime.simulate import Simulator
from p2pfl.topology.mixing import metropolis, weights
from p2pfl.topology.schedule import nobody

MOST_SAVED = 64  # nodes up to which every node's model is saved
ALONE = Ranks()


class Middle(NamedTuple):
    """The parameters of the mean model, ``[d]``, and the mean squared distance from it."""

    mean: Tensor
    distance: Tensor


def middle(ending: Ending, ranks: Ranks = ALONE) -> Middle:
    """Return the mean model of all rows, which every rank must ask for at the same time."""
    params = ending.params
    count = ranks.total(torch.tensor(len(params)))
    mean = ranks.total(params.sum(0, dtype=wide(params))) / count
    return Middle(mean, ranks.total(squared_distances(params, mean).sum()) / count)


def honest_only(ending: Ending, experiment: Experiment) -> Ending:
    """Return an ending without the attackers; what a run reports is about the others."""
    kept = torch.isin(ending.nodes, torch.tensor(experiment.honest, dtype=torch.int64))
    if bool(kept.all()):
        return ending
    params = ending.params[kept.to(ending.params.device)]
    return ending._replace(params=params, nodes=ending.nodes[kept])


def gathered(ending: Ending, nodes: int, ranks: Ranks) -> Ending:
    """Return an ending with all models if there are few enough, to be saved one by one."""
    if nodes > MOST_SAVED:
        return ending
    params = ranks.gather(ending.params.contiguous())
    return ending._replace(params=params, nodes=ranks.gather(ending.nodes))


def conserved(ending: Ending, moved: Tensor | None) -> dict[str, float]:
    """Return what a summary says of what exchanges should have left as it was.

    ``mean_drift`` is how far they have moved the mean of all models, as a part of its norm, and
    ``mass_kept`` the weight of those who are there, as a part of what they began with.

    Args:
        ending: of the run.
        moved: the sketch of all that exchanges have changed; None: it is not known.
    """
    if (mass := ending.mass) is not None:
        return {"mass_kept": mass.held / mass.begun} if mass.begun else {}
    return {"mean_drift": mean_drift(moved, ending.params)} if moved is not None else {}


@dataclass(frozen=True)
class Outcome:
    """The models at the end of a run and the data they are judged by."""

    experiment: Experiment
    federation: Federation
    task: ModelTask
    affine: Affine | None
    ending: Ending
    pooled: ModelTask  # of one node which holds everybody's data, as the mean model does
    middle: Middle
    ranks: Ranks = ALONE  # who holds which nodes

    @property
    def signature(self) -> Signature:
        """What goes into the models and what comes out."""
        return Signature.of(self.federation, self.experiment.loss(self.federation))

    def model(self, node: int | None) -> Predictor:
        """Return the model of a node, or for None the mean model.

        Raises:
            KeyError: the node did not live to the end.
        """
        if node is None:
            return Predictor.of(self.pooled, self.signature, self.middle.mean, 0)
        nodes = self.ending.nodes.tolist()
        if node not in nodes:
            raise KeyError(f"node {node} has no final model; these have: {nodes}")
        params = self.ending.params[nodes.index(node)]
        return Predictor.of(self.task, self.signature, params, node)

    def summary(self) -> dict[str, float]:
        """Measure the mean model and how far apart the models are."""
        loss, acc = self.pooled.evaluate(self.middle.mean.unsqueeze(0), torch.tensor([0]))
        return {
            "eval_loss_mean_model": loss.item(),
            "eval_acc_mean_model": acc.item(),
            "consensus_distance": self.middle.distance.item(),
        }

    def save(self, recorder: Recorder, round: int) -> None:
        """Save the final models, as the section ``output`` wants it."""
        which = self.experiment.output.models
        if which == "none":
            return
        recorder.model("mean", *save_tensors(self.model(None), round))
        if which == "all" and self.experiment.nodes <= MOST_SAVED:
            for node in self.ending.nodes.tolist():
                recorder.model(node, *save_tensors(self.model(node), round))


def pooled_task(
    experiment: Experiment,
    federation: Federation,
    affine: Affine | None,
    device: Any,  # noqa: ANN401
) -> ModelTask:
    """Return the task of a single node which holds everybody's training examples."""
    own_test = federation.own_test
    together = replace(
        federation,
        n=1,
        train=_one_shard(_of_honest(experiment, federation.train)),
        own_test=_one_shard(_of_honest(experiment, own_test)) if own_test else None,
    )
    mean = Affine(*(field.mean(0, keepdim=True) for field in affine)) if affine else None
    return experiment.task(together, mean, device)


def baselines(outcome: Outcome, steps: Tensor) -> dict[str, Any]:
    """Train every node alone, and one node on everybody's data, for as many examples.

    Ranks train their own nodes alone; the first, which has everybody's data, does the rest.

    Args:
        outcome: what is to be compared.
        steps: the local steps that each node took, ``[n]``.

    Returns:
        ``alone``: the score of each node (accuracy, or loss for a regression),
        ``alone_mean`` and ``pooled``, of and with the data of those who are no attackers.

    Raises:
        RunError: one of these trainings diverged.
    """
    opt = outcome.experiment.optimiser
    alone = _without_exchange(opt, outcome.task, steps, outcome.ranks)
    if outcome.ranks.rank:
        return {}
    honest = outcome.experiment.honest
    together = _steps_together(outcome.task, outcome.pooled, torch.tensor(honest), steps[honest])
    pooled = _without_exchange(opt, outcome.pooled, together, ALONE)
    return {
        "alone": alone.tolist(),
        "alone_mean": alone[honest].mean().item(),
        "pooled": pooled.item(),
    }


def _steps_together(task: ModelTask, pooled: ModelTask, nodes: Tensor, steps: Tensor) -> Tensor:
    """Return in how many steps, ``[1]``, one node goes through as many examples as some did."""
    batches = batch_sizes(task.train, nodes.to(task.device), task.batch_size).cpu()
    size = batch_sizes(pooled.train, pooled.train.nodes, pooled.batch_size).cpu()
    return (((steps * batches).sum() + size // 2) // size).clamp(min=1)


def _without_exchange(opt: Optimiser, task: ModelTask, steps: Tensor, ranks: Ranks) -> Tensor:
    """Let every node of a task train by itself; return how good they are, ``[n]``."""
    alone = nobody(len(steps))
    own_weights = weights(alone.links(0), metropolis()).to(task.device)
    own = (lambda nodes: steps[nodes.cpu()], lambda round: own_weights)
    setup = Setup(local(opt), task, alone, metropolis(), Pace(1), *own)
    (last,) = Simulator(setup, ranks).rounds()
    acc = torch.tensor([row.eval_acc for row in last], dtype=torch.float64)
    loss = torch.tensor([row.eval_loss for row in last], dtype=torch.float64)
    return loss if acc.isnan().all() else acc


def _of_honest(experiment: Experiment, shards: Shards) -> Shards:
    """Return the examples of the nodes that are no attackers."""
    if not experiment.attackers.who:
        return shards
    honest = torch.isin(shards.nodes, torch.tensor(experiment.honest))
    return shards.subset(shards.nodes[honest])


def _one_shard(shards: Shards) -> Shards:
    zero = torch.zeros(1, dtype=torch.int64)
    return Shards(shards.x, shards.y, zero, zero, torch.tensor([len(shards.y)]))
