"""The sections of an experiment file: what may stand in each, and what it defaults to."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any, Literal, NamedTuple

import networkx as nx

from p2pfl.algorithms import ALGORITHMS
from p2pfl.churn import CHURN
from p2pfl.data.batches import BatchSize
from p2pfl.data.datasets import DATASETS
from p2pfl.data.holdout import HOLDOUTS
from p2pfl.data.partition import PARTITIONERS
from p2pfl.experiment.attackers import attackers
from p2pfl.experiment.config import Kind
from p2pfl.learning.checks import above_zero
from p2pfl.learning.models import MODELS
from p2pfl.learning.optim import OPTIMISERS
from p2pfl.membership.timers import swim
from p2pfl.peer.stopping import StopRule
from p2pfl.runtime.network import NetworkModel
from p2pfl.topology.cliques import d_cliques_graph
from p2pfl.topology.files import Network, read_network
from p2pfl.topology.graphs import GRAPHS
from p2pfl.topology.mixing import MIXING
from p2pfl.topology.schedule import Topology
from p2pfl.topology.varying import SCHEDULES


class Training(NamedTuple):
    """How a peer trains; see `training`."""

    batch_size: BatchSize
    loss: str
    backend: str
    dtype: str
    compute: str
    block: int | None
    proximal: float
    share: list[str] | None
    mean_examples: float | None


def training(  # noqa: PLR0913 - a section: every parameter is a key of the file
    batch_size: BatchSize = 32,
    loss: Literal["auto", "cross_entropy", "binary", "squared"] = "auto",
    backend: Literal["auto", "stacked", "vmapped", "looped", "debug"] = "auto",
    dtype: Literal["float32", "float64", "bfloat16"] = "float32",
    compute: Literal["auto", "bfloat16"] = "auto",
    block: int | None = None,
    proximal: float = 0.0,
    share: list[str] | None = None,
    mean_examples: float | None = None,
) -> Training:
    """Say how a peer trains.

    Args:
        batch_size: examples in a batch, or ``"full"`` for all a node holds.
        loss: ``"auto"`` is cross-entropy for classes and squared error for numbers.
        backend: how gradients are computed; ``"auto"`` finds out what works.
        dtype: of the parameters. ``"bfloat16"`` halves memory and traffic (not that of shares of
            a mass, as in push-sum), but a step smaller than 1/256 of a parameter is rounded away.
        compute: of activations and gradients; ``"bfloat16"`` is faster and keeps the
            parameters as they are. ``"auto"`` is the type of the parameters.
        block: how many nodes are trained together, by default as many as fit the cache.
        proximal: weight of FedProx's pull towards the model of the last mixing.
        share: names of the parameters that are exchanged, such as ``["body.*"]``; the others
            never leave a node in a round (FedPer). By default all are.
        mean_examples: how many examples a node has on average. Given that, the gradients of each
            are multiplied by how many it has itself, over this: what is sought is the optimum of
            the loss over all examples, not of the mean of the nodes' losses.
    """
    if isinstance(batch_size, int) and batch_size < 1:
        raise ValueError(f"batch_size = {batch_size} is below 1")
    if proximal < 0:
        raise ValueError(f"proximal = {proximal} is below 0")
    if block is not None and block < 1:
        raise ValueError(f"block = {block} is below 1")
    if share is not None and not share:
        raise ValueError("share = [] shares nothing: leave it out, or take algorithm = 'local'")
    if mean_examples is not None:
        above_zero("mean_examples", mean_examples)
    held = (batch_size, loss, backend, dtype, compute, block)
    return Training(*held, proximal, share, mean_examples)


class Rounds(NamedTuple):
    """A pace in rounds; see `rounds`."""

    rounds: int
    local_steps: int | None
    local_epochs: int | None
    patience: float
    seconds: float
    stop: StopRule | None
    overlap: bool
    train_every: int


def rounds(  # noqa: PLR0913 - a section: every parameter is a key of the file
    rounds: int = 20,
    local_steps: int | None = None,
    local_epochs: int | None = None,
    patience: float = 30.0,
    seconds: float = math.inf,
    stop: StopRule | None = None,
    overlap: bool = False,
    train_every: int = 1,
) -> Rounds:
    """Train and exchange in rounds.

    Args:
        rounds: how many at most.
        local_steps: local steps in a round; or
        local_epochs: passes over the node's own data in a round (1 if neither is given).
        patience: seconds to wait for neighbours after sending. ``inf``: for ever, in step.
            0: never, asynchronous. A neighbour that missed a deadline is not waited for
            again until it has caught up.
        seconds: begin no further round after so many (virtual ones in the emulator).
        stop: a rule on which all peers agree to stop early.
        overlap: take the local steps of the next round while the messages of this one travel,
            from the model that was sent, and add what they change to what is mixed. A round
            takes as long as the slower of the two; its steps know nothing of the mixing yet.
        train_every: train in every so manieth round only, and exchange in all of them (Dhasade
            et al. 2024, SkipTrain): models agree more closely for the same work.
    """
    if rounds < 1:
        raise ValueError(f"rounds = {rounds} is below 1")
    if local_steps is not None and local_epochs is not None:
        raise ValueError("give either local_steps or local_epochs, not both")
    for name, value in (
        ("local_steps", local_steps),
        ("local_epochs", local_epochs),
        ("train_every", train_every),
    ):
        if value is not None and value < 1:
            raise ValueError(f"{name} = {value} is below 1")
    if not patience >= 0:
        raise ValueError(f"patience = {patience} is not a number >= 0")
    if not seconds > 0:
        raise ValueError(f"seconds = {seconds} is not above 0")
    if patience == 0 and (stop or overlap):
        what = "a stopping rule needs rounds in step" if stop else "overlap is for who waits"
        raise ValueError(f"{what}: patience must be above 0")
    epochs = 1 if local_steps is None and local_epochs is None else local_epochs
    return Rounds(rounds, local_steps, epochs, patience, seconds, stop, overlap, train_every)


class Timer(NamedTuple):
    """A pace by the clock; see `timer`."""

    period: float
    ticks: int
    local_steps: int


def timer(period: float = 0.1, ticks: int = 100, local_steps: int = 1) -> Timer:
    """Push to one random neighbour every `period` seconds, merge and train on arrival.

    Args:
        period: seconds between two pushes.
        ticks: how many pushes.
        local_steps: local steps after each merge, or in a period without one.
    """
    if not 0 < period < math.inf:
        raise ValueError(f"period = {period} is not a finite number above 0")
    for name, value in (("ticks", ticks), ("local_steps", local_steps)):
        if value < 1:
            raise ValueError(f"{name} = {value} is below 1")
    return Timer(period, ticks, local_steps)


class Evaluation(NamedTuple):
    """When and on what models are measured; see `evaluation`."""

    every: int
    on: str
    nodes: int | str
    baselines: bool


def evaluation(
    every: int = 1,
    on: Literal["pooled", "own"] = "pooled",
    nodes: int | Literal["all"] = 16,
    baselines: bool = False,
) -> Evaluation:
    """Say when and on what models are measured.

    Args:
        every: after every so many rounds, and after the last.
        on: all test examples, or those each node held out of its own data (which asks for
            ``holdout = "per_node"``).
        nodes: how many nodes are measured, or ``"all"``. Which ones is drawn by the seed;
            they are the same in every round and every runtime. The mean model is measured
            in any case.
        baselines: also train every node alone, and one node on everybody's data, for as
            many examples as it was in the run, to compare with. A learning-rate schedule
            goes by each one's own steps, of which the pooled node takes the most where
            nodes hold a batch or more.
    """
    if every < 1:
        raise ValueError(f"every = {every} is below 1")
    if isinstance(nodes, int) and nodes < 1:
        raise ValueError(f"nodes = {nodes} is below 1")
    return Evaluation(every, on, nodes, baselines)


def preprocess(standardise: Literal["none", "own", "pooled"] = "none") -> str:
    """Say how numeric features are standardised, and missing ones filled in (by the mean).

    Args:
        standardise: by the node's own statistics, or by everybody's: peers then average
            counts, sums and squares over the network before they train, and no row leaves.
    """
    return standardise


class Output(NamedTuple):
    """What a run leaves; see `output`."""

    dir: str
    models: str


def output(dir: str = "runs", models: Literal["all", "mean", "none"] = "all") -> Output:
    """Say what a run leaves behind.

    Args:
        dir: where run folders are made when no ``--out`` is given.
        models: which final models are saved; of more than 64 nodes only the mean.
    """
    return Output(dir, models)


def no_membership() -> None:
    """Know nothing but one's own neighbours: who has fallen silent leaves a gap."""


class Checkpointing(NamedTuple):
    """When checkpoints are written; see `checkpoint`."""

    every: int
    seconds: float
    keep: int


def checkpoint(every: int = 1, seconds: float = 30.0, keep: int = 2) -> Checkpointing:
    """Say when a run writes down all it needs to go on after it was killed.

    Args:
        every: rounds at least between two checkpoints; 0: none are written.
        seconds: at least so long between two, and twenty times as long as the last one took.
            0: whenever `every` says so, however long it takes.
        keep: how many are kept, the newest.
    """
    for name, value, least in (("every", every, 0), ("keep", keep, 1)):
        if value < least:
            raise ValueError(f"{name} = {value} is below {least}")
    if not 0 <= seconds < math.inf:
        raise ValueError(f"seconds = {seconds} is not a finite number >= 0")
    return Checkpointing(every, seconds, keep)


def network(  # noqa: PLR0913 - a section: every parameter is a key of the file
    links: dict[tuple[int, int], dict[str, float]],
    speeds: dict[int, float],
    *,
    latency: float = 0.001,
    jitter: float = 0.0,
    bandwidth: float = math.inf,
    uplink: float = math.inf,
    loss: float = 0.0,
    compute: float = 0.01,
    compute_jitter: float = 0.0,
    slow: float = 0.0,
    slow_factor: float = 10.0,
    seed: int | None = None,
) -> Callable[[int], NetworkModel]:
    """Model the network and the nodes, for the emulator; see `NetworkModel`.

    Single links and nodes may differ: what a network file says of them goes first.
    """
    model = NetworkModel(
        latency=latency,
        jitter=jitter,
        bandwidth=bandwidth,
        uplink=uplink,
        loss=loss,
        compute=compute,
        compute_jitter=compute_jitter,
        slow=slow,
        slow_factor=slow_factor,
        links=links,
        speeds=speeds,
    )
    return lambda other: replace(model, seed=other if seed is None else seed)


def network_file(n: int | None, path: str) -> Network:
    """Take the topology from a file: GraphML, JSON node-link, edge list or TOML."""
    found = read_network(Path(path))
    nodes = found.graph.number_of_nodes()
    if n is not None and n != nodes:
        raise ValueError(f"nodes = {n}, but {path} has {nodes}")
    return found


TOPOLOGIES: dict[str, Callable[..., nx.Graph | Network | Topology]] = {
    **GRAPHS,
    **SCHEDULES,
    "d_cliques": d_cliques_graph,
    "file": network_file,
}

SECTIONS: MappingProxyType[str, Kind] = MappingProxyType(
    {
        "data": Kind(DATASETS, "digits"),
        "holdout": Kind(HOLDOUTS, "random"),
        "partition": Kind(PARTITIONERS, "iid"),
        "preprocess": Kind({"": preprocess}),
        "model": Kind(MODELS, "mlp"),
        "training": Kind({"": training}),
        "optimiser": Kind(OPTIMISERS, "sgd"),
        "algorithm": Kind(ALGORITHMS, "fedavg", given=1, told=("n", "spec", "judge")),
        "topology": Kind(TOPOLOGIES, "complete", given=1),
        "mixing": Kind(MIXING),
        "pace": Kind({"rounds": rounds, "timer": timer}, "rounds"),
        "evaluation": Kind({"": evaluation}),
        "attackers": Kind({"": attackers}, given=2),
        "network": Kind({"": network}, given=2),
        "membership": Kind({"swim": swim, "none": no_membership}, "swim"),
        "churn": Kind(CHURN, "none", given=2),
        "output": Kind({"": output}),
        "checkpoint": Kind({"": checkpoint}),
    }
)

# What stands in a section that the file leaves out; the rest follows from the signatures.
DEFAULTS: MappingProxyType[str, dict[str, Any]] = MappingProxyType(
    {"optimiser": {"name": "sgd", "lr": 0.1}}
)
