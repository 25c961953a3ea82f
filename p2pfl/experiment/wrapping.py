"""The algorithm of an experiment, with all that was asked for around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from p2pfl.algorithm import Algorithm
from p2pfl.algorithms import (
    check_partial,
    follows_scale,
    partial,
    proximal,
    shared_columns,
    weighed,
)
from p2pfl.attacks import hostile
from p2pfl.errors import UserError
from p2pfl.experiment.attackers import Attackers
from p2pfl.experiment.config import Section
from p2pfl.experiment.sections import Training
from p2pfl.learning.judging import judge, unjudged
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.spec import Spec
from p2pfl.learning.task import ModelTask

NO_MODEL = Spec((), (), ())


def honest_algorithm(
    sections: Mapping[str, Section], nodes: int, task: ModelTask | None = None
) -> Algorithm[Any, Any, Any]:
    """Build the algorithm, with what was asked for around it.

    Args:
        sections: of the experiment.
        nodes: how many there are.
        task: what is learned. Without it whole models are exchanged, whatever is to be shared, none
            can be judged, and there may be no way to exchange any: what the algorithm asks of a
            network is the same.

    Raises:
        UserError: it names the section which asks for what the algorithm cannot do.
    """
    optimiser = sections["optimiser"].build("optimiser")
    section = sections["algorithm"]
    algorithm: Algorithm[Any, Any, Any] = section.build(
        "algorithm",
        optimiser,
        n=nodes,
        spec=task.spec if task else NO_MODEL,
        judge=judge(task) if task else unjudged,
    )
    training: Training = sections["training"].build("training")
    if training.share is not None:
        try:
            check_partial(algorithm)
            if task:
                algorithm = partial(algorithm, shared_columns(task.spec, training.share))
        except ValueError as error:
            raise UserError(f"training.share = {training.share}: {error}") from error
    if training.mean_examples is not None:
        _check_weighed(section, optimiser)
        algorithm = weighed(algorithm, training.mean_examples)
    return proximal(algorithm, training.proximal) if training.proximal else algorithm


def _check_weighed(section: Section, optimiser: Optimiser) -> None:
    """Refuse to weigh gradients where that is done already, or has no effect."""
    if section.values.get("weight") == "examples":
        raise UserError(
            f"training.mean_examples weighs nodes by their examples, and so does"
            f" algorithm.name = {section.name!r}: set algorithm.weight = 'uniform'"
        )
    if not follows_scale(optimiser):
        raise UserError(
            "training.mean_examples makes gradients longer, and the steps of this optimiser are as"
            " long whatever they are: use sgd"
        )


def build_algorithm(
    sections: Mapping[str, Section],
    nodes: int,
    attackers: Attackers,
    seed: int,
    task: ModelTask | None = None,
) -> Algorithm[Any, Any, Any]:
    """Build the algorithm of all nodes, those that attack the others among them.

    Args:
        sections: of the experiment.
        nodes: how many there are.
        attackers: who lies, and how.
        seed: draws the lies.
        task: see `honest_algorithm`.

    Raises:
        UserError: it names the section which asks for what the algorithm cannot do.
    """
    algorithm, (who, attack) = honest_algorithm(sections, nodes, task), attackers
    if attack is None:
        return algorithm
    try:
        return hostile(algorithm, attack, who, seed, whole=honest_algorithm(sections, nodes))
    except ValueError as error:
        name = sections["algorithm"].name
        raise UserError(f"attackers.attack with algorithm.name = {name!r}: {error}") from error
