"""What this machine can do at most: products of matrices, and copies in memory.

    python scripts/benchmarks/machine.py

Products are of two matrices ``[2048, 2048]``, in single precision and in bfloat16, with one
thread and with all; a copy counts what is read and what is written. Each figure is the best
of several, because whatever else runs on the machine can only make it worse.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import time
from collections.abc import Callable
from pathlib import Path

import torch

SIDE = 2048
COPIED = 256 << 20  # bytes, far more than any cache holds
REPEATS = 7


def main() -> None:
    """Measure, and print what was found."""
    print(describe())
    for threads in (1, cores()):
        single, half = (gigaflops(dtype, threads) for dtype in (torch.float32, torch.bfloat16))
        found = f"sgemm {single:.0f} GFLOP/s, in bfloat16 {half:.0f}"
        print(f"{threads} threads: {found}, copy {gigabytes(threads):.1f} GB/s")


def describe() -> str:
    """Return what the machine is, and the versions that matter."""
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("torch", "numpy")]
    return f"{processor()}, {cores()} cores; Python {platform.python_version()}, " + ", ".join(
        versions
    )


def cores() -> int:
    """Return the number of cores this process may use."""
    return len(os.sched_getaffinity(0))


def processor() -> str:
    """Return what the processor calls itself."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def gigaflops(dtype: torch.dtype, threads: int) -> float:
    """Return the rate of the products of two square matrices, in GFLOP/s."""
    one, two = (torch.randn(SIDE, SIDE).to(dtype) for _ in range(2))
    out = torch.empty_like(one)
    return 2 * SIDE**3 / best(lambda: torch.mm(one, two, out=out), threads) / 1e9


def gigabytes(threads: int) -> float:
    """Return how much a copy reads and writes in a second, in GB/s."""
    one = torch.ones(COPIED // 4)
    two = torch.zeros_like(one)
    return 2 * COPIED / best(lambda: two.copy_(one), threads) / 1e9


def best(work: Callable[[], object], threads: int) -> float:
    """Return the seconds of the fastest of several goes, with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    work()
    times = []
    for _ in range(REPEATS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    torch.set_num_threads(before)
    return min(times)


if __name__ == "__main__":
    main()
