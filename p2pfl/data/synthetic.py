"""Examples made up from a seed, as many as wanted: large simulations need no files."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from p2pfl.data.dataset import Dataset, Source
from p2pfl.errors import UserError

_CHUNK = 1 << 22  # numbers worked on at a time, so that no second copy of the examples is made


def synthetic(
    examples: int = 1000,
    shape: tuple[int, ...] = (20,),
    classes: int = 10,
    noise: float = 1.0,
    seed: int = 0,
) -> Source:
    """Made-up examples of any number and shape, the same for the same seed.

    An example is the centre of its class, drawn from a standard normal distribution, plus
    `noise` times a standard normal one; the classes are of equal size to within one. With
    ``classes = 0`` it is a regression: inputs are standard normal, the target is a random
    linear function of them, of variance about 1, plus `noise` times a standard normal number.

    Args:
        examples: how many.
        shape: of one example.
        classes: how many, at least 2, or 0 for a regression.
        noise: standard deviation around what could be learned, at least 0.
        seed: of all that is drawn; the experiment's seed changes nothing here.

    Raises:
        UserError: for a value that cannot work.
    """
    if examples < 1:
        raise UserError(f"synthetic: examples = {examples} must be at least 1")
    if not shape or min(shape) < 1:
        raise UserError(f"synthetic: shape = {list(shape)} must be one or more sizes above 0")
    if classes < 0 or classes == 1:
        raise UserError(f"synthetic: classes = {classes} must be at least 2, or 0 for a regression")
    if not 0 <= noise < math.inf:
        raise UserError(f"synthetic: noise = {noise} must be a finite number, at least 0")

    def load(data_dir: Path, only: int | None = None) -> Dataset:
        gen = torch.Generator().manual_seed(seed % 2**64)
        x = _memory(examples, shape)
        make = _classification if classes else _regression
        y = make(x.flatten(1), classes, noise, gen)
        return Dataset(x, y, classes=tuple(str(label) for label in range(classes)))

    return Source(load)


def _memory(examples: int, shape: tuple[int, ...]) -> Tensor:
    try:
        return torch.empty(examples, *shape)
    except RuntimeError as error:
        size = examples * math.prod(shape) * 4 / 2**30
        raise UserError(
            f"synthetic: examples = {examples} of shape = {list(shape)} take {size:.3g} GiB, more "
            "memory than there is"
        ) from error


def _classification(x: Tensor, classes: int, noise: float, gen: torch.Generator) -> Tensor:
    """Fill in `x`, ``[N, f]``, and return the classes, int64 ``[N]``."""
    centres = torch.randn(classes, x.shape[1], generator=gen)
    y = torch.randperm(len(x), generator=gen).remainder_(classes)
    x.normal_(generator=gen)
    for rows in _chunks(x):
        x[rows].mul_(noise).add_(centres[y[rows]])
    return y


def _regression(x: Tensor, classes: int, noise: float, gen: torch.Generator) -> Tensor:
    """Fill in `x`, ``[N, f]``, and return the targets, float32 ``[N]``."""
    slope = torch.randn(x.shape[1], generator=gen) / math.sqrt(x.shape[1])
    y = torch.randn(len(x), generator=gen) * noise
    x.normal_(generator=gen)
    for rows in _chunks(x):
        y[rows] += (x[rows] * slope).sum(1)
    return y


def _chunks(x: Tensor) -> list[slice]:
    many = max(1, _CHUNK // x.shape[1])
    return [slice(start, start + many) for start in range(0, len(x), many)]
