"""Decentralised learning: peers train on their own data and average, with no server.

>>> import p2pfl
>>> experiment = p2pfl.Experiment.from_dict({"nodes": 3, "pace": {"rounds": 2}})
>>> result = p2pfl.run(experiment, on="simulate")
>>> result.summary["rounds"]
2
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

__all__ = ["Experiment", "Predictor", "Result", "__version__", "load", "run"]

if TYPE_CHECKING:
    from p2pfl.experiment.experiment import Experiment
    from p2pfl.launch.session import run
    from p2pfl.results.predictor import Predictor
    from p2pfl.results.runs import Result
    from p2pfl.results.saved import load

# Looked up when first used: importing the package should not import torch.
_HOMES = {
    "Experiment": "p2pfl.experiment.experiment",
    "Predictor": "p2pfl.results.predictor",
    "Result": "p2pfl.results.runs",
    "load": "p2pfl.results.saved",
    "run": "p2pfl.launch.session",
}


def __getattr__(name: str) -> Any:  # noqa: ANN401
    if name not in _HOMES:
        raise AttributeError(f"module 'p2pfl' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOMES[name]), name)
