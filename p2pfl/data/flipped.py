"""Labels turned around: what attackers train on who spoil their data and nothing else."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

import torch

from p2pfl.data.shards import Federation


def with_flipped_labels(federation: Federation, nodes: Collection[int]) -> Federation:
    """Return a federation in which some nodes train on ``classes - 1 - y`` in place of y.

    Raises:
        ValueError: there are no classes.
    """
    train, classes = federation.train, len(federation.classes)
    if not classes:
        raise ValueError("attackers.attack = 'label_flip' asks for classes, and these are numbers")
    flipped = torch.isin(train.nodes, torch.tensor(sorted(nodes)))
    y = torch.where(flipped.repeat_interleave(train.count), classes - 1 - train.y, train.y)
    return replace(federation, train=replace(train, y=y))
