"""What is learned: models, losses, gradients for blocks of rows, and local optimisers.

A `Task` gives losses and gradients; `ModelTask` is one over any `nn.Module`, `Quadratics` one
whose solution is known. `train` is the loop which every runtime calls.
"""

from __future__ import annotations

from p2pfl.learning.evaluation import Scores
from p2pfl.learning.losses import LOSSES, Loss, default_loss
from p2pfl.learning.models import MODELS, ModelFactory, load_factory
from p2pfl.learning.optim import OPTIMISERS, Optimiser
from p2pfl.learning.quadratics import Quadratics
from p2pfl.learning.schedules import SCHEDULES, Schedule
from p2pfl.learning.spec import Spec
from p2pfl.learning.task import ModelTask, Task, per_node
from p2pfl.learning.training import local_steps, train

__all__ = [
    "LOSSES",
    "MODELS",
    "OPTIMISERS",
    "SCHEDULES",
    "Loss",
    "ModelFactory",
    "ModelTask",
    "Optimiser",
    "Quadratics",
    "Schedule",
    "Scores",
    "Spec",
    "Task",
    "default_loss",
    "load_factory",
    "local_steps",
    "per_node",
    "train",
]
