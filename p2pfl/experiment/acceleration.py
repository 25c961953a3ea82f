"""Whether accelerated averaging goes with the weights and the pace of an experiment."""

from __future__ import annotations

import torch

from p2pfl.errors import UserError
from p2pfl.experiment.config import Section
from p2pfl.experiment.pairing import DENSE
from p2pfl.experiment.sections import Rounds, Timer
from p2pfl.topology.mixing import Mixing, weights
from p2pfl.topology.schedule import Topology

ROUNDED = 1e-6  # by so little a bound may have been rounded down


def check_accelerated(
    section: Section, topology: Topology, mixing: Mixing, pace: Rounds | Timer
) -> None:
    """Refuse `chebyshev` where it may diverge, or nothing is accelerated.

    Raises:
        UserError: it says what would do.
    """
    if section.name != "chebyshev" or isinstance(pace, Timer):
        return
    if pace.train_every == 1:
        raise UserError(
            "algorithm.name = 'chebyshev' speeds up exchanges between local steps, of which there"
            " are none with pace.train_every = 1: set it to 2 or more, or use dpsgd"
        )
    if not 1 < topology.n <= DENSE:
        return
    matrix = weights(topology.links(0), mixing).to_dense()
    if not torch.allclose(matrix, matrix.T, rtol=0, atol=ROUNDED):
        raise UserError(
            "algorithm.name = 'chebyshev' needs symmetric weights, and those of mixing.name ="
            f" {mixing.name!r} on this topology are not: use metropolis"
        )
    told, rho = section.values["rho"], float(torch.linalg.eigvalsh(matrix)[:-1].abs().max())
    if rho > told + ROUNDED:
        raise UserError(
            f"algorithm.rho = {told} is below that of these weights, {rho:.6f}, so that exchanges"
            " may drive models apart: give that, or a little more"
        )
