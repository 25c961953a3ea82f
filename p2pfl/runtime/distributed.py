"""The nodes of a simulation, shared out among processes that torch.distributed has joined.

Every rank holds a stretch of nodes. It works out from the whole mixing matrix who needs which
rows, so that nothing but those rows, the metrics and a few sums travels.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import torch
import torch.distributed as dist
from torch import Tensor

from p2pfl.algorithm import Inbox, R
from p2pfl.errors import UserError
from p2pfl.learning.tree import wide
from p2pfl.runtime.arena import Arena, open_arena
from p2pfl.runtime.parting import exchanging
from p2pfl.runtime.ranks import Fetched, Fields, Neighbourhood, Ranks

SLACK = 4096  # bytes of shared memory that may lie between blocks
# How many times the columns that a single process mixes at a time: ranks wait for each other at
# every block, longer over sockets than in shared memory.
NEAR, FAR = 2, 4


class Distributed(Ranks):
    """The ranks of the process group that torch.distributed has been initialised with."""

    def __init__(self) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._arena = open_arena(self.rank, self.size)

    def nodes(self, n: int) -> Tensor:
        """Return the nodes of this rank, int64, ascending: one stretch of about n / size.

        Raises:
            UserError: there are fewer nodes than ranks.
        """
        if n < self.size:
            raise UserError(f"nodes = {n}: expected at least one for each of {self.size} ranks")
        return torch.arange(*self._edges(n)[self.rank : self.rank + 2])

    def gather(self, mine: Tensor) -> Tensor:
        """Return the rows of all ranks in the order of the nodes, ``[mine, ...] -> [n, ...]``."""
        return _gathered(mine)

    def total(self, mine: Tensor) -> Tensor:
        """Return the sum over all ranks, of numbers of equal shape."""
        return _reduced(mine, dist.ReduceOp.SUM)

    def neighbourhood(self, weights: Tensor, by_columns: bool = False) -> Neighbourhood:
        """Return what the nodes of this rank hear, from the whole mixing matrix ``[n, n]``.

        Senders are in the order of the nodes, so that all add up in the same order as one
        process. Where everybody hears everybody alike, no row travels: sums do. Where fields are
        fetched by columns, on one machine, a few of everybody's lie in memory that all share.
        """
        edges = self._edges(len(weights))
        first, last = edges[self.rank : self.rank + 2]
        if len(weights) > 1 and weights.layout is torch.strided and weights.stride(0) == 0:
            own = torch.arange(first, last, device=weights.device)
            mine = weights[first:last]
            return Neighbourhood(mine, own, lambda fields: lambda: fields, _agreed, Everybody)
        if by_columns and self._arena and weights.device.type == "cpu":
            ends = _senders(weights, first, last)[[0, -1]].tolist()
            heard = slice(ends[0], ends[1] + 1)
            common = _Common(slice(first, last), heard, len(weights), self._arena)
            mine = _rows(weights, first, last, torch.arange(heard.start, heard.stop))
            most = (self._arena.bytes - SLACK) // len(weights)
            own = torch.arange(first - heard.start, last - heard.start)
            return Neighbourhood(mine, own, common.fetch, partial(_agreed, times=NEAR, most=most))
        senders = [_senders(weights, *stretch) for stretch in pairwise(edges)]
        cuts = torch.tensor(edges, device=weights.device)
        bounds = [torch.searchsorted(each, cuts).tolist() for each in senders]
        wanted = [each[(each >= first) & (each < last)] - first for each in senders]
        own = torch.arange(*bounds[self.rank][self.rank : self.rank + 2], device=weights.device)
        mine = _rows(weights, first, last, senders[self.rank])
        return Neighbourhood(mine, own, _Halo(self.rank, bounds, wanted).fetch, _agreed)

    def _edges(self, n: int) -> list[int]:
        return [n * rank // self.size for rank in range(self.size + 1)]


@dataclass(frozen=True, slots=True)
class Everybody(Inbox[R]):
    """What the rows of a rank have heard where everybody hears everybody alike.

    The senders are all nodes, but `heard` holds the rank's own rows alone; all ranks add up theirs.
    """

    def mix(self, field: Tensor, by: Tensor | None = None) -> Tensor:
        """Return the weighted sum over all nodes, ``[rows, d] -> [rows, d]``; as of `Inbox`."""
        exact = wide(field)
        row = self.weights[:1, self.own].to(exact)
        if by is not None:
            row = row * by.to(exact).T
            row = row / _reduced(row.sum(), dist.ReduceOp.SUM)
        mine = row @ field.to(exact)
        mixed = _reduced(mine, dist.ReduceOp.SUM).to(field.dtype)
        return mixed.expand(len(self.own), -1)

    def mean(self, field: Tensor, by: Tensor) -> Tensor:
        """Return the mean over all nodes in proportion to `by`; as of `Inbox`."""
        return self.mix(field, by)  # their weights are equal

    def largest(self, field: Tensor) -> Tensor:
        """Return the largest value of all nodes, ``[rows, 1] -> [rows, 1]``."""
        mine = field.amax(0, keepdim=True)
        return _reduced(mine, dist.ReduceOp.MAX).expand(len(self.own), -1)

    def mine(self, field: Tensor) -> Tensor:
        """Return what the others know of the rows themselves; as of `Inbox`."""
        return field

    def gather(self, field: Tensor) -> tuple[Tensor, Tensor]:
        """Return everybody's rows for every row, and a mask without gaps; as of `Inbox`."""
        everybody = _gathered(field)
        mask = torch.ones(self.weights.shape, dtype=torch.bool, device=field.device)
        return everybody.expand(len(self.own), *everybody.shape), mask


@dataclass(frozen=True, slots=True)
class _Common:
    """Everybody's rows side by side, each written by the rank that has it.

    Attributes:
        own: which of them are this rank's.
        heard: from the first to the last of those whom it hears.
        rows: how many there are.
        arena: where they are.
    """

    own: slice
    heard: slice
    rows: int
    arena: Arena

    def fetch(self, fields: Fields) -> Fetched:
        """Write the own rows, and begin to wait for the others; see `Neighbourhood`."""
        if not fields:
            return lambda: fields
        if not self.arena.holds(self.rows, fields):  # only columns are sure to
            gathered = tuple(_gathered(field)[self.heard] for field in fields)
            return lambda: gathered
        self.arena.turn()
        whole = tuple(self.arena.blocks(self.rows, fields))
        for block, field in zip(whole, fields, strict=True):
            block[self.own] = field

        def wait() -> Fields:
            self.arena.meet()
            return tuple(block[self.heard] for block in whole)

        return wait


@dataclass(frozen=True, slots=True)
class _Halo:
    """Which rows a rank takes from each rank, and which it gives to each.

    Attributes:
        rank: this one.
        bounds: of those whom rank q hears, the nodes of rank r stand from ``bounds[q][r]`` to
            ``bounds[q][r + 1]``.
        wanted: which of its own rows each rank wants, int64.
    """

    rank: int
    bounds: list[list[int]]
    wanted: list[Tensor]

    @exchanging()
    def fetch(self, fields: Fields) -> Fetched:
        """Send rows, and begin to receive others; see `Neighbourhood`."""
        operations: list[dist.P2POp] = []
        whole = tuple(self._begin(field, operations) for field in fields)
        works = dist.batch_isend_irecv(operations) if operations else []

        @exchanging()
        def wait() -> Fields:
            for work in works:
                work.wait()
            return whole

        return wait

    def _begin(self, field: Tensor, operations: list[dist.P2POp]) -> Tensor:
        """Return a block with the own rows in place, and note what is to be sent and received."""
        whole = field.new_empty(self.bounds[self.rank][-1], *field.shape[1:])
        whole[self._part(self.rank, self.rank)] = field
        for rank, wanted in enumerate(self.wanted):
            part = whole[self._part(self.rank, rank)]
            if rank == self.rank:
                continue
            if len(part):
                operations.append(dist.P2POp(dist.irecv, part, rank))
            if len(wanted):
                sent = field.index_select(0, wanted)
                operations.append(dist.P2POp(dist.isend, sent, rank))
        return whole

    def _part(self, of: int, by: int) -> slice:
        """Return where the nodes of one rank stand among those whom another hears."""
        return slice(self.bounds[of][by], self.bounds[of][by + 1])


def _senders(weights: Tensor, first: int, last: int) -> Tensor:
    """Return whom some rows hear, themselves included, int64, ascending."""
    heard = torch.zeros(len(weights), dtype=torch.bool, device=weights.device)
    if weights.layout is torch.sparse_csr:
        start = weights.crow_indices()
        heard[weights.col_indices()[start[first] : start[last]]] = True
    else:
        heard = (weights[first:last] != 0).any(0)
    heard[first:last] = True
    return heard.nonzero().flatten()


def _rows(weights: Tensor, first: int, last: int, senders: Tensor) -> Tensor:
    """Return some rows of a matrix, and of them the columns of the senders."""
    if weights.layout is not torch.sparse_csr:
        return weights[first:last, senders]
    start = weights.crow_indices()[first : last + 1]
    inside = slice(int(start[0]), int(start[-1]))
    return torch.sparse_csr_tensor(
        start - start[0],
        torch.searchsorted(senders, weights.col_indices()[inside]),
        weights.values()[inside],
        (last - first, len(senders)),
        check_invariants=False,  # they hold, as in the matrix it was cut from
    )


@exchanging()
def _gathered(mine: Tensor) -> Tensor:
    """Return the rows of all ranks, who may hold unequal numbers of them."""
    length = torch.tensor([len(mine)], device=mine.device)
    counts = [torch.empty_like(length) for _ in range(dist.get_world_size())]
    dist.all_gather(counts, length)
    lengths = torch.cat(counts).tolist()
    padded = mine.new_zeros(max(lengths), *mine.shape[1:])
    padded[: len(mine)] = mine
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length] for part, length in zip(parts, lengths, strict=True)])


def _agreed(width: int, row: int, times: int = FAR, most: int = sys.maxsize) -> int:
    """Return the least of what the ranks propose: machines and shares of the nodes differ.

    More columns than fit the cache best, since all ranks wait for each other at every block;
    but no more than fit the memory they share, if they do.

    Args:
        width: how many columns this rank would mix at a time.
        row: the bytes of a column in one row.
        times: how many times as many all are to mix.
        most: the bytes that there is room for in each row.
    """
    wider = times * int(_reduced(torch.tensor(width), dist.ReduceOp.MIN))
    return max(1, min(wider, most // max(1, row)))


@exchanging()
def _reduced(mine: Tensor, operation: dist.ReduceOp.RedOpType) -> Tensor:
    """Return the sum, or the like, over all ranks."""
    everybody = mine.clone(memory_format=torch.contiguous_format)
    dist.all_reduce(everybody, operation)
    return everybody
