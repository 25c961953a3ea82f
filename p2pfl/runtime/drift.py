"""How far exchanges of which only one end made use have moved the mean of all models."""

from __future__ import annotations

from threading import Lock
from typing import Any

import torch

from p2pfl.algorithm import Algorithm
from p2pfl.runtime.sketch import WIDTH, sketch


class Drift:
    """Adds up what every exchange has changed: nothing, as long as both ends of a link mix alike.

    It is worked out from linear sketches, whose norms are near those of the models (9 %).
    """

    def __init__(self) -> None:
        self._total, self._lock = torch.zeros(WIDTH, dtype=torch.float64), Lock()

    def watch(self, algorithm: Algorithm[Any, Any, Any]) -> Algorithm[Any, Any, Any]:
        """Return the same algorithm, whose exchanges are added up."""

        def receive(state: Any, inbox: Any) -> Any:  # noqa: ANN401 - of any algorithm
            after = algorithm.receive(state, inbox)
            moved = sketch(algorithm.model(after) - algorithm.model(state)).double().flatten()
            with self._lock:
                self._total += moved.cpu()
            return after

        return algorithm._replace(receive=receive)

    def of_mean(self, peers: int) -> float:
        """Return by how much the mean of so many models has moved, as a norm."""
        return float(self._total.norm()) / max(1, peers)
