from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from p2pfl.algorithm import Algorithm
from p2pfl.data.shards import Examples, Shards
from p2pfl.learning import models
from p2pfl.learning.modules import pure
from p2pfl.learning.optim import Optimiser


class LocalState(NamedTuple):
    x: Tensor
    opt: tuple


def local(opt: Optimiser) -> Algorithm:
    """Train and hear nobody."""

    def step(s, grads):
        update, state = opt.update(grads, s.opt, s.x)
        return LocalState(s.x + update, state)

    def init(x, rows):
        return LocalState(x, opt.init(x))

    return Algorithm(init, lambda s: s.x, step, lambda s: (s.x,), lambda s, inbox: s)


def shards(counts: list[int], shape: tuple[int, ...], classes: int = 3, seed: int = 0) -> Shards:
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(sum(counts), *shape, generator=draw)
    y = torch.randint(classes, (sum(counts),), generator=draw)
    count = torch.tensor(counts)
    return Shards(x, y, torch.arange(len(counts)), count.cumsum(0) - count, count)


def examples(count: int, shape: tuple[int, ...], classes: int = 3, seed: int = 9) -> Examples:
    return shards([count], shape, classes, seed).rows_of(0)


class Odd(nn.Module):
    """Everything at once: tied weights, a frozen layer, a buffer, dropout used twice."""

    def __init__(self, features: int, outputs: int) -> None:
        super().__init__()
        self.one = nn.Linear(features, features)
        self.two = nn.Linear(features, features)
        self.two.weight = self.one.weight
        self.frozen = nn.Linear(features, features).requires_grad_(False)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(features, outputs)
        self.unused = nn.Parameter(torch.ones(3))
        self.register_buffer("offset", torch.linspace(-1, 1, features))

    def forward(self, x: Tensor) -> Tensor:
        x = self.drop(torch.tanh(self.one(x.flatten(1)) + self.offset))
        x = self.drop(torch.tanh(self.two(x)))
        return self.head(torch.tanh(self.frozen(x)))


class Shared(nn.Module):
    """One layer under two names, a parameter without dimensions, and a forward pass that writes."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.first = nn.Linear(inputs, 5)
        self.layers = nn.ModuleList([self.first, nn.Linear(5, outputs)])
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.hidden: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        self.hidden = torch.tanh(self.first(x.flatten(1)))
        return self.layers[1](self.hidden) * self.scale


def _batchnorm(shape, outputs):
    conv = nn.Conv2d(shape[0], 4, 3)
    return nn.Sequential(
        conv,
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Dropout2d(0.4),
        nn.Flatten(),
        nn.Linear(4 * (shape[1] - 2) * (shape[2] - 2), 5),
        nn.BatchNorm1d(5),
        nn.Linear(5, outputs),
    )


MODELS = {
    "linear": ((6,), models.linear()),
    "mlp": ((6,), models.mlp([7, 5], "gelu", dropout=0.4)),
    "cnn": ((1, 8, 8), models.cnn([4], kernel=3, hidden=9)),
    "lenet": ((1, 12, 12), models.lenet()),
    "batchnorm": ((2, 6, 6), _batchnorm),
    "odd": ((6,), lambda shape, outputs: Odd(shape[0], outputs)),
    "shared": ((6,), lambda shape, outputs: Shared(shape[0], outputs)),
}


def build(name: str, outputs: int = 3) -> tuple[tuple[int, ...], nn.Module]:
    shape, factory = MODELS[name]
    torch.manual_seed(4)
    return shape, factory(shape, outputs).double()


class Lstm(nn.Module):
    """Draws dropout masks that nobody but torch can see."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(3, 4, num_layers=2, dropout=0.5, batch_first=True)
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def block(shape, module, rows: int = 5, b: int = 4):
    """A pure model with a block of different rows, a batch and keys."""
    made = pure(module)
    draw = torch.Generator().manual_seed(1)
    start = made.spec.flatten(module)
    params = start + 0.1 * torch.randn(rows, len(start), generator=draw, dtype=start.dtype)
    x = torch.randn(rows, b, *shape, generator=draw, dtype=torch.float64)
    y = torch.randint(3, (rows, b), generator=draw)
    return made, params, x, y, torch.arange(rows) * 12345
