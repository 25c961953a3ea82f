"""The algorithm of an experiment, with all that was asked for around it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from p2pfl.algorithm import Algorithm
from p2pfl.algorithms import check_partial, partial, proximal, shared_columns
from p2pfl.attacks import hostile
from p2pfl.errors import UserError
from p2pfl.experiment.attackers import Attackers
from p2pfl.experiment.config import Section
from p2pfl.experiment.sections import Training
from p2pfl.learning.spec import Spec

NO_MODEL = Spec((), (), ())


def honest_algorithm(
    sections: Mapping[str, Section], nodes: int, spec: Spec | None = None
) -> Algorithm[Any, Any, Any]:
    """Build the algorithm, sharing a part of the model and with FedProx's pull if asked for.

    Args:
        sections: of the experiment.
        nodes: how many there are.
        spec: of the model. Without it whole models are exchanged, whatever is to be shared, and
            there may be no way to exchange any: what the algorithm asks of a network is the same.

    Raises:
        UserError: it names the section which asks for what the algorithm cannot do.
    """
    optimiser = sections["optimiser"].build("optimiser")
    algorithm: Algorithm[Any, Any, Any] = sections["algorithm"].build(
        "algorithm", optimiser, n=nodes, spec=spec or NO_MODEL
    )
    training: Training = sections["training"].build("training")
    if training.share is not None:
        try:
            check_partial(algorithm)
            if spec:
                algorithm = partial(algorithm, shared_columns(spec, training.share))
        except ValueError as error:
            raise UserError(f"training.share = {training.share}: {error}") from error
    return proximal(algorithm, training.proximal) if training.proximal else algorithm


def build_algorithm(
    sections: Mapping[str, Section],
    nodes: int,
    attackers: Attackers,
    seed: int,
    spec: Spec | None = None,
) -> Algorithm[Any, Any, Any]:
    """Build the algorithm of all nodes, those that attack the others among them.

    Args:
        sections: of the experiment.
        nodes: how many there are.
        attackers: who lies, and how.
        seed: draws the lies.
        spec: see `honest_algorithm`.

    Raises:
        UserError: it names the section which asks for what the algorithm cannot do.
    """
    algorithm, (who, attack) = honest_algorithm(sections, nodes, spec), attackers
    if attack is None:
        return algorithm
    try:
        return hostile(algorithm, attack, who, seed, whole=honest_algorithm(sections, nodes))
    except ValueError as error:
        name = sections["algorithm"].name
        raise UserError(f"attackers.attack with algorithm.name = {name!r}: {error}") from error
