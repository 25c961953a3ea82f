"""The local steps of many peers, taken together once the first of them are wanted."""

from __future__ import annotations

import time
from typing import Any

import torch
from torch import Tensor

from p2pfl.learning.crew import share_out
from p2pfl.learning.scratch import Scratch
from p2pfl.learning.training import train_
from p2pfl.learning.tree import split, tree_map, unshared
from p2pfl.peer.events import PeerId, Train, Trained
from p2pfl.runtime.later import Later
from p2pfl.runtime.setup import Setup

Asked = list[tuple[PeerId, Train]]


class Batch:
    """What peers have asked to be trained, and what is done but not yet fetched.

    Args:
        setup: the run; states are `Later` ones of its algorithm.
        keep_blocks: leave the models that were trained together in one block of memory, which
            lasts as long as any of them. Else each gets its own.

    Attributes:
        count: how many times training was done for all who waited for it.
        seconds: spent on it, mixing included.
    """

    def __init__(self, setup: Setup, keep_blocks: bool) -> None:
        self._setup, self._keep_blocks = setup, keep_blocks
        self._asked: dict[PeerId, Train] = {}
        self._done: dict[PeerId, Trained] = {}
        self.count, self.seconds = 0, 0.0
        self._scratch = Scratch()

    def ask(self, peer: PeerId, train: Train) -> None:
        """Put local steps on the list."""
        self._asked[peer] = train

    def forget(self, peer: PeerId) -> None:
        """Take a peer off the list: nobody wants its steps any more."""
        self._asked.pop(peer, None)
        self._done.pop(peer, None)

    def is_done(self, peer: PeerId) -> bool:
        """Say whether the local steps of a peer have been taken."""
        return peer in self._done

    def fetch(self, peer: PeerId) -> Trained:
        """Return what came of a peer's local steps."""
        if peer not in self._done:
            began = time.perf_counter()
            self._train_all()
            self.count += 1
            self.seconds += time.perf_counter() - began
        return self._done.pop(peer)

    def _train_all(self) -> None:
        # Rows which make equally many steps are neighbours, so that they stay stacked.
        asked = sorted(self._asked.items(), key=lambda item: item[1].count)
        self._asked.clear()
        task = self._setup.task
        self._prepare(asked)
        share_out(lambda rows: self._train(asked[rows]), len(asked), task.block, task.parallel)

    def _prepare(self, asked: Asked) -> None:
        """Tell the task what comes next, where all make equally many plain steps."""
        counts = {train.count for _, train in asked}
        if len(counts) == 1 and self._setup.algorithm.factor:
            nodes = torch.tensor([peer for peer, _ in asked])
            first = torch.tensor([train.step for _, train in asked])
            self._setup.task.prepare(nodes, first, counts.pop())

    def _train(self, asked: Asked) -> None:
        """Mix and train a few rows while they are in the cache."""
        task, algorithm = self._setup.task, self._setup.algorithm
        state = self._laid_out([train.state for _, train in asked])
        nodes = torch.tensor([peer for peer, _ in asked])
        first = torch.tensor([train.step for _, train in asked])
        count = torch.tensor([train.count for _, train in asked])
        losses = train_(algorithm, task, state, nodes, first, count).tolist()
        rows = split(state, len(asked))
        for (peer, train), row, loss in zip(asked, rows, losses, strict=True):
            own = row if self._keep_blocks else tree_map(torch.clone, row)
            self._done[peer] = Trained(train.step, Later(algorithm, own), loss)

    def _laid_out(self, states: list[Later]) -> Any:  # noqa: ANN401
        """Return the states as one block; models are mixed where they are to lie."""
        params = self._setup.task.init(torch.zeros(0, dtype=torch.int64))
        shape = (len(states), params.shape[1])
        # What is copied out of it afterwards may lie where the block before lay.
        models = (
            params.new_empty(shape)
            if self._keep_blocks
            else self._scratch.of("models", shape, params, params.dtype)
        )
        rows = [state.worked_out(models[i : i + 1]) for i, state in enumerate(states)]

        def lay(*leaves: Tensor) -> Tensor:
            if all(leaf.data_ptr() == models[i].data_ptr() for i, leaf in enumerate(leaves)):
                return models
            return torch.cat(leaves)

        return unshared(tree_map(lay, *rows))
