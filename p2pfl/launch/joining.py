"""The ranks that torchrun has started, joined for the length of a run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import timedelta

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import Store
from torch.distributed.rendezvous import rendezvous

from p2pfl.errors import RunError, UserError, first_line
from p2pfl.runtime.distributed import Distributed
from p2pfl.runtime.parting import exchanging
from p2pfl.runtime.ranks import Ranks

PATIENCE = timedelta(minutes=30)  # the longest that one rank may keep the others waiting
# By torchrun, beside how many there are.
TOLD = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
LAST_WORDS = timedelta(seconds=10)  # for the first rank to close the books of a failed run


@contextmanager
def joined(on: str, device: str) -> Iterator[Ranks]:
    """Join the ranks that torchrun has started, if it has; else there is one process.

    What goes wrong leaves the first rank that tells of it as it came; the others, which it
    takes along, leave quietly with the same exit code.

    Args:
        on: where the experiment runs.
        device: where it is computed; ``"cuda"`` is a GPU of its own for each rank.

    Raises:
        UserError: torchrun has started several ranks, and it is no simulation, or there are
            fewer GPUs than ranks; or it has not, and the environment says so all the same.
        RunError: another rank has gone.
    """
    if _count() == 1:
        yield Ranks()
        return
    try:
        store, rank, size = next(rendezvous("env://", timeout=PATIENCE))
    except dist.DistError as error:
        raise RunError(f"the ranks cannot meet: {first_line(error)}") from error
    try:
        if on != "simulate":
            raise UserError(f"--on {on}: torchrun spreads simulations only, use --on simulate")
        if device == "cuda":
            _take_gpu(_number("LOCAL_RANK"))
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        about = {"timeout": PATIENCE, "world_size": size, "rank": rank, "store": store}
        with exchanging():
            dist.init_process_group(backend, **about)
        yield Distributed()
    except BaseException as error:
        first = _first(store, _code(error))
        _part(store, rank)
        if not first:
            raise SystemExit(int(store.get("code"))) from None
        raise
    dist.destroy_process_group()


def _count() -> int:
    """Return how many ranks there are, as torchrun tells each of them."""
    count = _number("WORLD_SIZE", "1")
    if count == 1:
        return count
    if lacking := [name for name in TOLD if name not in os.environ]:
        raise UserError(
            f"WORLD_SIZE = {count} in the environment, but not {', '.join(lacking)}: torchrun sets"
            " them all; for a single process unset WORLD_SIZE"
        )
    for name in ("RANK", "LOCAL_RANK", "MASTER_PORT"):
        _number(name)
    return count


def _number(name: str, default: str = "") -> int:
    told = os.environ.get(name, default)
    if not told.isdecimal():
        raise UserError(f"{name} = {told} in the environment: expected a whole number")
    return int(told)


def _take_gpu(place: int) -> None:
    """Let ``"cuda"`` mean one of this machine's GPUs."""
    count = torch.cuda.device_count()
    if place >= count:
        raise UserError(f"--device cuda: expected a GPU for each rank, this machine has {count}")
    torch.cuda.set_device(place)


def _first(store: Store, code: int) -> bool:
    """Tell the others that this rank has failed; return whether none of them has told before."""
    try:
        first: bool = store.add("failed", 1) == 1
        if first:
            store.set("code", str(code))
    except dist.DistError:  # the store went with the rank that kept it: nobody else can tell
        return True
    return first


def _part(store: Store, rank: int) -> None:
    """Leave the others, whose exchanges with this rank then fail.

    torchrun ends all ranks as soon as one has gone, so the first rank, which writes the run
    folder, is waited for.
    """
    if dist.is_initialized():
        dist.destroy_process_group()
    with suppress(dist.DistError):
        if rank == 0:
            store.set("closed", "")
        else:
            store.wait(["closed"], LAST_WORDS)


def _code(error: BaseException) -> int:
    """Return the exit code that an error has in the command line."""
    if isinstance(error, KeyboardInterrupt):
        return 130
    return 2 if isinstance(error, UserError) else 1
