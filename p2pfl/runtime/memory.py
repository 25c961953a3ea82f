"""What a run in one process needs of the machine's memory, worked out before it is taken."""

from __future__ import annotations

import math
from pathlib import Path
from typing import NamedTuple

import psutil
import torch
from torch import Tensor

from p2pfl.algorithm import Rows, newest
from p2pfl.errors import UserError
from p2pfl.learning.cache import cache_bytes
from p2pfl.learning.tree import leaves, wide
from p2pfl.runtime.exchange import block_width
from p2pfl.runtime.setup import Setup
from p2pfl.topology.schedule import in_degrees

WORKING = 256 << 20  # torch's own, activations and evaluation
BLOCKS = 6  # what all threads train at a time: parameters, gradients, what an optimiser makes
# The rest was measured, as models of each node (`scripts/benchmarks/memory.py`).
EMULATED = 3  # in the emulator: its own, those on the way, those it heard
UNEVEN = 5  # the same where nobody waits for ever, and some may be ahead of others
OVERLAPPED = 2  # states beside its own that a node holds while it trains and exchanges
DIFFERENCES = 3  # where messages are differences: taken, decoded, added
QUANTISED = 7  # where numbers become small integers: scaled, rounded, packed, and back
COMPARED = 5  # of each neighbour, where models are compared: side by side, and their differences
SORTED = 6  # of each neighbour, where columns are: side by side, in order, and what came where
LOOKED_AT = 8  # rounds of a topology that changes
CGROUP = Path("/sys/fs/cgroup")  # where Linux tells how much a container may use


class Needed(NamedTuple):
    """The memory of a run, in bytes."""

    state: int  # of the algorithm, all nodes
    memory: int  # what is remembered of senders, or copied in the exchange
    working: int  # everything else that is yet to be allocated
    free: int  # what the machine or device has left

    @property
    def total(self) -> int:
        """All that is yet to be allocated."""
        return self.state + self.memory + self.working

    def __str__(self) -> str:
        return (
            f"{_gb(self.total)} of memory ({_gb(self.state)} for the nodes' state,"
            f" {_gb(self.memory)} for what they hear), {_gb(self.free)} are free"
        )


def needed(setup: Setup, held: int, emulated: bool = False, twice: bool = False) -> Needed:
    """Return what a run needs, judging by a single node.

    Args:
        setup: the run; its data are in memory already.
        held: how many nodes this process holds.
        emulated: whether they run in the emulator.
        twice: whether a second run, by which it is judged, holds plain models beside it.
    """
    algorithm, one = setup.algorithm, torch.tensor([0])
    params = setup.task.init(one)
    known, one = setup.neighbours(one), one.to(params.device)
    rows = Rows(one, torch.ones_like(one), None if known is None else known.to(params.device))
    state = algorithm.init(params, rows)
    message = algorithm.send(state)
    own = sum(leaf.nbytes for leaf in leaves(state))
    remembered = _beyond(algorithm.absorb(None, message, params.shape[1]), state)
    at_once = _at_once(setup, params, message)
    block = min(setup.task.block, held) * params.nbytes  # which can be asked for
    trained = min(cache_bytes(params.device, 1), held * params.nbytes)
    trained *= BLOCKS * wide(params).itemsize // params.element_size()
    working = WORKING + max(trained, 2 * block)
    working += _sorted(setup, params, held, emulated)
    more = remembered + _beyond((algorithm.model(state),), state)
    if twice:
        more += params.nbytes
    if emulated:
        waits = getattr(setup.pace, "patience", 0.0) == math.inf
        more += ((EMULATED if waits else UNEVEN) - 1) * own
        if algorithm.absorb is not newest:  # of every sender by itself
            more += _degree(setup) * remembered
        working += at_once  # there it is one node after the other
    else:
        more += at_once if algorithm.columnwise else at_once + own
    if getattr(setup.pace, "overlap", False):
        more += OVERLAPPED * own
    return Needed(held * own, held * more, working, free(params.device))


def _at_once(setup: Setup, params: Tensor, message: tuple[Tensor, ...]) -> int:
    """Return the bytes of one node where all are encoded, or compared, at once."""
    algorithm, full = setup.algorithm, params.numel() * wide(params).itemsize
    models = 0
    if algorithm.absorb is not newest:
        models += DIFFERENCES
    if any(8 * f.numel() >= params.numel() and not f.is_floating_point() for f in message):
        models += QUANTISED
    if algorithm.needs.rule and not algorithm.columnwise:
        models += COMPARED * (_degree(setup) + 1)
    models += algorithm.needs.addressed  # of which each neighbour gets another
    if full > params.nbytes:  # of two bytes, which are reckoned with in four
        models += 1 + math.ceil(models / 5)
    return models * full


def _sorted(setup: Setup, params: Tensor, held: int, emulated: bool) -> int:
    """Return the bytes of a rule that looks at some columns of all neighbours side by side."""
    if not (setup.algorithm.needs.rule and setup.algorithm.columnwise):
        return 0
    d = params.shape[1]
    numbers = d if emulated else held * min(d, block_width((params.expand(held, d),), d))
    models = SORTED * torch.get_num_threads() * (_degree(setup) + 1)
    return models * numbers * wide(params).itemsize


def _degree(setup: Setup) -> int:
    """Return how many neighbours a node hears at most, as far as its first rounds tell."""
    topology = setup.topology
    rounds = range(min(topology.period or LOOKED_AT, LOOKED_AT))
    return max(int(in_degrees(topology.links(round)).max()) for round in rounds)


def check(need: Needed) -> None:
    """Refuse a run that cannot fit.

    Raises:
        UserError: it says how much is missing and what would help.
    """
    if need.total > need.free:
        raise UserError(
            f"this run needs {need}: take fewer nodes, training.dtype = 'bfloat16', an optimiser"
            " that remembers less, or share the nodes out among machines (docs/distributed.md)"
        )


def free(device: torch.device) -> int:
    """Return the bytes that can still be allocated on a device."""
    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return min(int(psutil.virtual_memory().available), _left_to_container())


def _beyond(heard: tuple[Tensor, ...], state: object) -> int:
    """Return the bytes of a memory that are not the state itself."""
    known = {leaf.untyped_storage().data_ptr() for leaf in leaves(state)}
    return sum(f.nbytes for f in heard if f.untyped_storage().data_ptr() not in known)


def _left_to_container() -> int:
    try:
        limit = (CGROUP / "memory.max").read_text().strip()
        used = int((CGROUP / "memory.current").read_text())
        stat = dict(line.split() for line in (CGROUP / "memory.stat").read_text().splitlines())
        cached = int(stat["file"]) - int(stat["shmem"])  # given back when it is wanted
    except (OSError, ValueError, KeyError):
        return 1 << 62
    return int(limit) - used + cached if limit.isdigit() else 1 << 62


def _gb(size: int) -> str:
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"
