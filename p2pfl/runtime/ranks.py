"""Whether the nodes of a simulation are held by one process or shared out among several."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from p2pfl.algorithm import Inbox

Fields = tuple[Tensor, ...]
Fetched = Callable[[], Fields]  # waits


class Neighbourhood(NamedTuple):
    """What some rows hear, and how they get it.

    Attributes:
        weights: of the rows, ``[rows, senders]``, dense or CSR.
        own: where each row stands among the senders, int64 ``[rows]``.
        fetch: given blocks of these rows, ``[rows, ...]``, begin to fetch those of the other
            senders; what is returned waits for them and returns ``[senders, ...]`` each, good
            until the next but one are fetched. At most one fetch goes ahead of those waited for.
        agree: given how many columns this process would mix at a time, and the bytes of a
            column in one row, how many all mix.
        inbox: what is made of weights, what was heard, and `own`.
        side_by_side: whether threads may mix several blocks of columns at once; not where
            processes have to agree on the order.
    """

    weights: Tensor
    own: Tensor
    fetch: Callable[[Fields], Fetched]
    agree: Callable[[int, int], int] = lambda width, row: width
    inbox: Callable[[Tensor, Any, Tensor], Inbox[Any]] = Inbox
    side_by_side: bool = False


class Ranks:
    """A single process, which holds all nodes."""

    rank, size = 0, 1

    def nodes(self, n: int) -> Tensor:
        """Return the nodes this process holds, int64, ascending."""
        return torch.arange(n)

    def gather(self, mine: Tensor) -> Tensor:
        """Return everybody's rows in the order of the nodes, ``[mine, ...] -> [n, ...]``."""
        return mine

    def total(self, mine: Tensor) -> Tensor:
        """Return the sum over all processes, of numbers of equal shape."""
        return mine

    def neighbourhood(self, weights: Tensor, by_columns: bool = False) -> Neighbourhood:
        """Return what the nodes of this process hear.

        Args:
            weights: the whole mixing matrix, ``[n, n]``.
            by_columns: whether a few columns of large fields are fetched at a time.
        """
        own = torch.arange(len(weights), device=weights.device)
        threads = weights.device.type == "cpu"
        return Neighbourhood(weights, own, lambda fields: lambda: fields, side_by_side=threads)
