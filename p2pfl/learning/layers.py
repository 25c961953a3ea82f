"""Layers whose forward and backward pass are written out for a whole block of rows.

Autograd would keep a gradient for every parameter of every row. Written by hand, a layer
adds its gradient to wherever it is wanted as it is computed: into a gradient, or, scaled by
minus the learning rate, straight into the weights. Activations are ``[rows, b, ...]``, the
parameters of a layer ``[rows, *shape]``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol, cast

import torch
from torch import Tensor, nn
from torch.nn import functional

from p2pfl import rng
from p2pfl.learning.modules import KeyedDropout

aten = torch.ops.aten
Views = Mapping[str, Tensor]  # parameters by name, [rows, *shape]
Saved = Any  # what a layer needs of its forward pass in its backward pass


class Sink(Protocol):
    """Where a layer puts the gradient of a parameter."""

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        """Take ``left @ right``, ``[rows, p, q] @ [rows, q, r]``, as the gradient of `name`."""

    def plain(self, name: str, grad: Tensor) -> None:
        """Take the gradient of `name` as it is, ``[rows, *shape]``."""


class Layer(Protocol):
    """One layer of a chain."""

    def forward(self, params: Views, x: Tensor, keys: Tensor) -> tuple[Tensor, Saved]:
        """Return the output and what `backward` needs. `keys`, ``[rows]``, draw masks."""

    def backward(
        self, params: Views, saved: Saved, dy: Tensor, sink: Sink, inner: bool
    ) -> Tensor | None:
        """Take the derivative by the output; return that by the input, or None unless `inner`.

        `dy` may be overwritten. The derivative by the input is computed before the sink
        hears of the parameters, as it may change them.
        """


@dataclass(frozen=True)
class Linear:
    """``nn.Linear``."""

    weight: str
    bias: str | None

    def forward(self, params: Views, x: Tensor, keys: Tensor) -> tuple[Tensor, Saved]:
        """Return ``x Wᵀ + b``."""
        flat, weight = x.flatten(1, -2), _packed(params[self.weight])
        if self.bias is None:
            y = torch.bmm(flat, weight.mT)
        else:
            y = torch.baddbmm(params[self.bias].unsqueeze(1), flat, weight.mT)
        return y.view(*x.shape[:-1], y.shape[-1]), (x, weight)

    def backward(
        self, params: Views, saved: Saved, dy: Tensor, sink: Sink, inner: bool
    ) -> Tensor | None:
        """Return ``dy W``."""
        (x, weight), flat = saved, dy.flatten(1, -2)
        dx = torch.bmm(flat, weight).view(x.shape) if inner else None
        sink.product(self.weight, flat.mT, x.flatten(1, -2))
        if self.bias is not None:
            sink.plain(self.bias, flat.sum(1))
        return dx


@dataclass(frozen=True)
class Convolution:
    """``nn.Conv1d``, ``nn.Conv2d`` and ``nn.Conv3d``, one row after the other.

    A convolution is long enough to keep a core busy by itself, and libraries are better at
    one than at a block of them.
    """

    weight: str
    bias: str | None
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    groups: int

    def forward(self, params: Views, x: Tensor, keys: Tensor) -> tuple[Tensor, Saved]:
        """Return the convolutions of all rows."""
        biases = params[self.bias] if self.bias else [None] * len(x)
        each = zip(x, params[self.weight], biases, strict=True)
        return torch.stack([self._convolve(*row) for row in each]), x

    def backward(
        self, params: Views, saved: Saved, dy: Tensor, sink: Sink, inner: bool
    ) -> Tensor | None:
        """Return the derivative by the images."""
        x, weight = saved, params[self.weight]
        rows = zip(dy, x, weight, strict=True)
        parts = [self._transposed(*row, inner) for row in rows]
        sink.plain(self.weight, torch.stack([part[1] for part in parts]))
        if self.bias is not None:
            sink.plain(self.bias, torch.stack([part[2] for part in parts]))
        return torch.stack([part[0] for part in parts]) if inner else None

    def _convolve(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        how = (self.stride, self.padding, self.dilation)
        none = [0] * len(self.stride)
        y: Tensor = aten.convolution(x, weight, bias, *how, False, none, self.groups)
        return y

    def _transposed(self, dy: Tensor, x: Tensor, weight: Tensor, inner: bool) -> list[Tensor]:
        how = (self.stride, self.padding, self.dilation)
        none, wanted = [0] * len(self.stride), [inner, True, self.bias is not None]
        sizes = [weight.shape[0]] if self.bias else None
        parts: list[Tensor] = aten.convolution_backward(
            dy, x, weight, sizes, *how, False, none, self.groups, wanted
        )
        return parts


@dataclass(frozen=True)
class Activation:
    """A function of each number: `slope` takes (dy, output) or, `by_input`, (dy, input)."""

    value: Callable[[Tensor], Tensor]
    slope: Callable[[Tensor, Tensor], Tensor]
    by_input: bool = False

    def forward(self, params: Views, x: Tensor, keys: Tensor) -> tuple[Tensor, Saved]:
        """Apply the function."""
        y = self.value(x)
        return y, x if self.by_input else y

    def backward(
        self, params: Views, saved: Saved, dy: Tensor, sink: Sink, inner: bool
    ) -> Tensor | None:
        """Multiply by the slope."""
        return self.slope(dy, saved) if inner else None


@dataclass(frozen=True)
class MaxPool2d:
    """``nn.MaxPool2d``."""

    kernel: list[int]
    stride: list[int]
    padding: list[int]
    dilation: list[int]
    ceil_mode: bool

    def forward(self, params: Views, x: Tensor, keys: Tensor) -> tuple[Tensor, Saved]:
        """Return the largest value of each window."""
        flat = x.flatten(0, 1)
        y, where = aten.max_pool2d_with_indices(flat, *self._how)
        return y.view(*x.shape[:2], *y.shape[1:]), (flat, where)

    def backward(
        self, params: Views, saved: Saved, dy: Tensor, sink: Sink, inner: bool
    ) -> Tensor | None:
        """Hand each derivative to the place that was the largest."""
        if not inner:
            return None
        x, where = saved
        dx = aten.max_pool2d_with_indices_backward(dy.flatten(0, 1), x, *self._how, where)
        return cast(Tensor, dx.view(*dy.shape[:2], *x.shape[1:]))

    @property
    def _how(self) -> tuple[list[int], list[int], list[int], list[int], bool]:
        return self.kernel, self.stride, self.padding, self.dilation, self.ceil_mode


@dataclass(frozen=True)
class Flatten:
    """``nn.Flatten`` of everything but the batch."""

    def forward(self, params: Views, x: Tensor, keys: Tensor) -> tuple[Tensor, Saved]:
        """Return ``[rows, b, features]``."""
        return x.flatten(2), x.shape

    def backward(
        self, params: Views, saved: Saved, dy: Tensor, sink: Sink, inner: bool
    ) -> Tensor | None:
        """Return the shape it had."""
        return dy.reshape(saved) if inner else None


@dataclass(frozen=True)
class Dropout:
    """`KeyedDropout`: the masks it draws for one row, for a block of rows."""

    drop: KeyedDropout

    def forward(self, params: Views, x: Tensor, keys: Tensor) -> tuple[Tensor, Saved]:
        """Drop what the keys say, and scale up the others."""
        mask = self._mask(x, keys)
        return x * mask, mask

    def backward(
        self, params: Views, saved: Saved, dy: Tensor, sink: Sink, inner: bool
    ) -> Tensor | None:
        """Drop the same."""
        return dy * saved if inner else None

    def _mask(self, x: Tensor, keys: Tensor) -> Tensor:
        p = self.drop.p
        if p in (0, 1):
            return x.new_full((1,), 1.0 - p)
        shape = x.shape[1:3] + (1,) * (x.ndim - 3) if self.drop.whole_channels else x.shape[1:]
        key = rng.fold(rng.fold(keys, self.drop.layer), 0)
        kept = rng.uniform(key, shape.numel()) >= p
        return kept.reshape(len(keys), *shape).to(x.dtype) / (1 - p)


def _packed(weight: Tensor) -> Tensor:
    """Return weights in the layout that products want.

    Rows of a block lie a whole model apart, which products in single precision take as it
    is, and those in half precision copy first, at many times the cost of our doing so.
    """
    return weight.contiguous() if weight.itemsize < 4 else weight


def _relu(module: nn.ReLU) -> Activation:
    return Activation(torch.relu, lambda dy, y: aten.threshold_backward(dy, y, 0))


def _gelu(module: nn.GELU) -> Activation:
    how = module.approximate
    return Activation(
        lambda x: functional.gelu(x, approximate=how),
        lambda dy, x: aten.gelu_backward(dy, x, approximate=how),
        by_input=True,
    )


ACTIVATIONS: Mapping[type[nn.Module], Callable[[Any], Layer]] = MappingProxyType(
    {
        nn.ReLU: _relu,
        nn.Tanh: lambda module: Activation(torch.tanh, aten.tanh_backward),
        nn.Sigmoid: lambda module: Activation(torch.sigmoid, aten.sigmoid_backward),
        nn.GELU: _gelu,
        nn.Identity: lambda module: Activation(lambda x: x, lambda dy, y: dy),
    }
)
