"""An experiment: one file that says what is learned, by whom, from what and how.

The same experiment runs in all three runtimes. Reading it checks everything that can be
checked without the data, so a mistake is found before anything has started.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
import tomli_w
import torch
from torch import Tensor

from p2pfl.algorithm import Algorithm
from p2pfl.churn.script import Script
from p2pfl.data.dataset import Source
from p2pfl.data.flipped import with_flipped_labels
from p2pfl.data.shards import Federation, federate
from p2pfl.data.statistics import Affine
from p2pfl.errors import UserError
from p2pfl.experiment.acceleration import check_accelerated
from p2pfl.experiment.assembly import build_setup, measured
from p2pfl.experiment.attackers import Attackers
from p2pfl.experiment.building import DTYPES, build_affine, build_task, check_measured
from p2pfl.experiment.config import Section, Value
from p2pfl.experiment.defence import check_epidemic, check_judged
from p2pfl.experiment.files import change, find, load_toml, shipped
from p2pfl.experiment.nodes import MENDED, as_topology
from p2pfl.experiment.pairing import Pairing, check_pairing
from p2pfl.experiment.reading import read_tables
from p2pfl.experiment.remarks import remarks
from p2pfl.experiment.sections import (
    Checkpointing,
    Evaluation,
    Output,
    Rounds,
    Timer,
    Training,
)
from p2pfl.experiment.terms import terms
from p2pfl.experiment.wrapping import build_algorithm
from p2pfl.learning.losses import LOSSES, Loss, default_loss
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.task import ModelTask
from p2pfl.learning.training import local_steps
from p2pfl.membership.timers import Timers
from p2pfl.runtime.network import NetworkModel
from p2pfl.runtime.setup import Setup
from p2pfl.topology.files import Network
from p2pfl.topology.live import Overlay
from p2pfl.topology.mixing import Mixing
from p2pfl.topology.schedule import Topology, nobody


@dataclass(frozen=True)
class Experiment:
    """A checked experiment. Make one with `load` or `from_dict`.

    Attributes:
        name: what run folders are called.
        seed: draws everything: initial weights, partition, batches, lots.
        nodes: how many peers there are.
        sections: the sections, every default spelled out.
        base: the folder that relative paths in the file start from.
    """

    name: str
    seed: int
    nodes: int
    sections: Mapping[str, Section]
    base: Path

    @classmethod
    def load(cls, path: str | Path, changes: Iterable[str] = ()) -> Experiment:
        """Read an experiment file, or one that ships with the package, by its name.

        Args:
            path: a TOML file, or a name as in ``p2pfl experiments``.
            changes: ``"pace.rounds=2"`` and the like, made before anything is checked.

        Raises:
            UserError: the file is missing, is not TOML, or describes what cannot be.
        """
        found = find(path)
        tables = load_toml(found)
        tables.setdefault("name", found.stem)
        # What ships with the package finds the user's data where the user is.
        base = Path.cwd() if found in shipped().values() else found.parent
        return cls.from_dict(tables, base, changes)

    @classmethod
    def from_dict(
        cls, tables: Mapping[str, Value], base: str | Path = ".", changes: Iterable[str] = ()
    ) -> Experiment:
        """Check an experiment given as nested dictionaries, laid out as in a file."""
        experiment = cls(*read_tables(change(tables, changes), base))
        experiment._check()
        return experiment

    def to_dict(self) -> dict[str, Value]:
        """Return the experiment with every default spelled out, as it could stand in a file."""
        plain = {key: section.plain() for key, section in self.sections.items()}
        top = {"name": self.name, "seed": self.seed, "nodes": self.nodes, "base": str(self.base)}
        return {**top, **plain}

    def to_toml(self) -> str:
        """Return the experiment as the text of a file."""
        return tomli_w.dumps(self.to_dict())

    def terms(self, task: ModelTask) -> dict[str, str]:
        """Return what all peers of a run must agree on, by key, for the handshake."""
        return terms(self.to_dict(), self.topology, task)

    @property
    def training(self) -> Training:
        """The section ``training``."""
        return self._build("training")  # type: ignore[no-any-return]

    @property
    def evaluation(self) -> Evaluation:
        """The section ``evaluation``."""
        return self._build("evaluation")  # type: ignore[no-any-return]

    @property
    def output(self) -> Output:
        """The section ``output``."""
        return self._build("output")  # type: ignore[no-any-return]

    @cached_property
    def churn(self) -> Script | None:
        """What happens to peers and links while it runs, if anything does."""
        script: Script = self._build("churn", self.nodes, self.seed)
        eventful = script.happenings or len(script.founders) < self.nodes
        return script if eventful else None

    @cached_property
    def membership(self) -> Timers | None:
        """The section ``membership``: how peers find out who is there; None: not by themselves."""
        return self._build("membership")  # type: ignore[no-any-return]

    @cached_property
    def among(self) -> Callable[[tuple[int, ...]], Topology]:
        """The topology of those who are there: the same rule among fewer, or what is left."""
        section = self.sections["topology"]
        if self.algorithm.needs.weights == "none" or section.name in MENDED:
            return Overlay(self.topology, None).among
        return Overlay(
            self.topology, lambda k: as_topology(section.build("topology", k), section.name)
        ).among

    @property
    def checkpoint(self) -> Checkpointing:
        """The section ``checkpoint``."""
        return self._build("checkpoint")  # type: ignore[no-any-return]

    @property
    def standardise(self) -> str:
        """The section ``preprocess``: whose statistics are used, if any."""
        return self._build("preprocess")  # type: ignore[no-any-return]

    @cached_property
    def pace(self) -> Rounds | Timer:
        """The section ``pace``."""
        return self._build("pace")  # type: ignore[no-any-return]

    @property
    def optimiser(self) -> Optimiser:
        """The section ``optimiser``."""
        return self._build("optimiser")  # type: ignore[no-any-return]

    @cached_property
    def algorithm(self) -> Algorithm[Any, Any, Any]:
        """The algorithm with its optimiser, and what was asked for around it.

        FedProx's pull, and the lies of the attackers. It exchanges whole models; which parts of
        them are shared is known once there is a model.
        """
        return build_algorithm(self.sections, self.nodes, self.attackers, self.seed)

    @cached_property
    def attackers(self) -> Attackers:
        """Who attacks the others, and how."""
        return self._build("attackers", self.nodes, self.seed)  # type: ignore[no-any-return]

    @property
    def attack(self) -> str | None:
        """What the attackers do, by name."""
        section = self.sections["attackers"].values["attack"]
        return None if section is None else str(section.name)

    @property
    def honest(self) -> list[int]:
        """The nodes which are no attackers, ascending: what a run reports is about them."""
        return [node for node in range(self.nodes) if node not in self.attackers.who]

    @cached_property
    def mixing(self) -> Mixing:
        """The mixing rule."""
        return self._build("mixing")  # type: ignore[no-any-return]

    @cached_property
    def drawn(self) -> nx.Graph | Network | Topology:
        """The graph, the network file or the schedule that the section ``topology`` names."""
        return self._build("topology", self.nodes)

    @cached_property
    def topology(self) -> Topology:
        """Who talks to whom; nobody to anybody for algorithms that hear nobody."""
        if self.algorithm.needs.weights == "none":
            return nobody(self.nodes)
        return as_topology(self.drawn, self.sections["topology"].name)

    @cached_property
    def network(self) -> NetworkModel:
        """The modelled network, with what a network file says of single links and nodes."""
        links: dict[tuple[int, int], dict[str, float]] = {}
        speeds: dict[int, float] = {}
        if isinstance(self.drawn, Network):
            speeds = self.drawn.speed
            for ends, link in self.drawn.links.items():
                links[ends] = {k: v for k, v in link._asdict().items() if v is not None}
        model: NetworkModel = self._build("network", links, speeds)(self.seed)
        return model

    def federation(self, data_dir: Path | None = None, only: int | None = None) -> Federation:
        """Load the data and share them out; with ``only=k`` just what peer k holds.

        Args:
            data_dir: the folder that relative paths start from, by default the file's own.
            only: the node whose training examples are kept.

        Raises:
            UserError: the data cannot be read, or shared out so, or do not measure what the
                run is to stop by.
        """
        source: Source = self._build("data")
        if source.files is not None and source.files != self.nodes:
            raise UserError(f"nodes = {self.nodes}, but data.path lists {source.files} files")
        dataset = source.load(data_dir or self.base, only)
        partitioner, holdout = self._build("partition"), self._build("holdout")
        try:
            shared = federate(dataset, partitioner, holdout, self.nodes, self.seed, only)
            who, attack = self.attackers
            if attack and attack.labels:
                shared = with_flipped_labels(shared, who)
        except ValueError as error:
            raise UserError(str(error)) from error
        check_measured(self, shared)
        return shared

    def task(self, federation: Federation, affine: Affine | None, device: str = "cpu") -> ModelTask:
        """Return the learning problem of the nodes whose data `federation` holds.

        Args:
            federation: their data.
            affine: how to standardise, ``[held, f]``, a row for each of them; None: not.
            device: where to compute.
        """
        return build_task(self, federation, affine, device)

    def loss(self, federation: Federation) -> Loss:
        """Return what is minimised on these data."""
        name = self.training.loss
        return default_loss(len(federation.classes)) if name == "auto" else LOSSES[name]()

    @property
    def exact(self) -> torch.dtype:
        """The type of statistics: that of the parameters, but not half precision."""
        return torch.promote_types(DTYPES[self.training.dtype], torch.float32)

    def affine(self, federation: Federation) -> Affine | None:
        """Return how the data of each node are standardised, ``[held, f]``, or None.

        With everybody's data in one place, pooled statistics are simply added up; peers
        reach the same numbers by averaging over the network.
        """
        return build_affine(self, federation)

    @property
    def rounds(self) -> int:
        """The most rounds, or ticks, that a run of this experiment takes."""
        return self.pace.ticks if isinstance(self.pace, Timer) else self.pace.rounds

    @cached_property
    def notes(self) -> list[str]:
        """What the user should know beforehand and is no mistake."""
        return remarks(self._pairing)

    def setup(self, task: ModelTask, pooled: ModelTask | None = None) -> Setup:
        """Return what a runtime needs to run this experiment on a task.

        Args:
            task: of all nodes, or of one.
            pooled: what the mean model is measured on while the run goes on, if at all.
        """
        return build_setup(self, task, pooled)

    def local_steps(self, examples: Tensor) -> Tensor:
        """Return the local steps in a round of nodes with so many examples, int64 ``[rows]``."""
        epochs = self.pace.local_epochs if isinstance(self.pace, Rounds) else None
        if epochs is not None:
            return local_steps(examples, self.training.batch_size, epochs)
        return torch.full_like(examples, self.pace.local_steps or 1)

    def _build(self, key: str, *given: Any) -> Any:  # noqa: ANN401
        return self.sections[key].build(key, *given)

    @property
    def _pairing(self) -> Pairing:
        names = {key: section.name for key, section in self.sections.items()}
        lazy = bool(self.sections["mixing"].values.get("lazy"))
        return Pairing(
            names,
            self.algorithm.needs,
            self.algorithm.carry is not None,
            self.topology,
            self.mixing,
            lazy,
            self.pace,
            self.standardise,
            self.algorithm.restart is not None,
            self.churn is not None,
            self.attackers.attack is not None and not self.attackers.attack.finite,
            self.network.loss > 0,
            self.sections["algorithm"].values.get("rounds"),
        )

    def _check(self) -> None:
        for key in ("data", "partition", "holdout", "model", "output", "preprocess"):
            self._build(key)
        _ = (self.network, self.evaluation, self.membership, self.checkpoint, self.churn)
        holdout = self.sections["holdout"].name
        if self.evaluation.on == "own" and holdout != "per_node":
            raise UserError(
                f"evaluation.on = 'own' asks for holdout.name = 'per_node', not {holdout!r}"
            )
        check_pairing(self._pairing)
        check_epidemic(self.sections, self.nodes, len(self.attackers.who))
        check_accelerated(self.sections["algorithm"], self.topology, self.mixing, self.pace)
        check_judged(self.sections["algorithm"], self.topology, self.attackers.who, self.nodes)
        rule = None if isinstance(self.pace, Timer) else self.pace.stop
        evaluated = rule is not None and rule.metric.startswith("eval")
        if rule and evaluated and self.attackers.who:
            raise UserError(
                f"pace.stop.metric = {rule.metric!r} asks what every node has reached, but"
                " attackers are not measured: use metric = 'train_loss'"
            )
        if rule and evaluated and measured(self) is not None:
            raise UserError(
                f"pace.stop.metric = {rule.metric!r} asks what every node has reached, but"
                f" evaluation.nodes = {self.evaluation.nodes} of {self.nodes} are measured:"
                " set evaluation.nodes = 'all'"
            )
