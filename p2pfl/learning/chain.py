"""Which modules are chains of `layers`, and their gradients for a whole block of rows."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.dropout import _DropoutNd

from p2pfl.learning.layers import (
    ACTIVATIONS,
    Convolution,
    Dropout,
    Flatten,
    Layer,
    Linear,
    MaxPool2d,
    Sink,
    Views,
)
from p2pfl.learning.losses import Loss
from p2pfl.learning.modules import KeyedDropout, Pure
from p2pfl.learning.scratch import Scratch
from p2pfl.learning.tree import wide

_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)


class NotAChain(Exception):
    """A module is not a chain of known layers; the message says which part is not."""


def layers_of(model: Pure, evaluating: bool = False) -> list[Layer]:
    """Return the layers of a model that is an `nn.Sequential` of those known here.

    Args:
        model: the model.
        evaluating: as they are in evaluation, when nothing is dropped.

    Raises:
        NotAChain: it is something else, shares or freezes parameters, or has hooks.
    """
    layers, names, dropouts = [], [], set()
    for name, module in _flat(model.evaluating if evaluating else model.training, ""):
        if isinstance(module, KeyedDropout):
            if module in dropouts:
                raise NotAChain(f"{name} is used twice")
            dropouts.add(module)
        layers.append(_layer(name, module))
        names += [f"{name}.{p}".lstrip(".") for p, _ in module.named_parameters()]
    if sorted(names) != sorted(model.spec.names):
        raise NotAChain("some parameters are shared, or not trained")
    return layers


def outputs_of(layers: list[Layer], params: Views, x: Tensor) -> Tensor:
    """Return the outputs ``[rows, b, k]`` for examples ``[rows, b, ...]``, in evaluation."""
    keys = torch.zeros(len(x), dtype=torch.int64, device=x.device)
    for layer in layers:
        x, _ = layer.forward(params, x, keys)
    return x


def value_and_grad(
    layers: list[Layer],
    loss: Loss,
    params: Views,
    batch: tuple[Tensor, Tensor, Tensor],
    sink: Sink,
    factor: Tensor | float = 1.0,
) -> Tensor:
    """Return the mean loss of each row's batch, ``[rows]``; the sink gets the gradients.

    Args:
        layers: of the model.
        loss: with a derivative.
        params: by name.
        batch: examples ``[rows, b, ...]``, targets ``[rows, b]`` and keys ``[rows]``.
        sink: told of every gradient, from the last layer to the first.
        factor: multiplies the gradients, ``[rows, 1]``.
    """
    assert loss.derivative is not None
    h, y, keys = batch
    tape = []
    for layer in layers:
        h, saved = layer.forward(params, h, keys)
        tape.append((layer, saved))
    each, slope = loss.derivative(h.to(wide(h)), y)
    scale = factor.unsqueeze(2) if isinstance(factor, Tensor) else factor
    dy: Tensor | None = slope.mul_(scale / each.shape[1]).to(h.dtype)
    first = next(i for i, layer in enumerate(layers) if isinstance(layer, Linear | Convolution))
    for i in reversed(range(first, len(layers))):
        layer, saved = tape.pop()
        assert dy is not None
        dy = layer.backward(params, saved, dy, sink, i > first)
    return each.mean(1)


class Into:
    """A sink which writes gradients, or adds them, to views of one block."""

    def __init__(self, views: Views, add: bool, scratch: Scratch | None = None) -> None:
        self._views, self._add, self._scratch = views, add, scratch or Scratch()

    def product(self, name: str, left: Tensor, right: Tensor) -> None:
        """Write or add ``left @ right``; without a copy where the types are equal."""
        place = self._views[name]
        if place.dtype == left.dtype:
            place.baddbmm_(left, right, beta=1.0 if self._add else 0.0)
        else:
            shape = (*left.shape[:2], right.shape[2])
            product = self._scratch.of("product", shape, left, left.dtype)
            self.plain(name, torch.bmm(left, right, out=product))

    def plain(self, name: str, grad: Tensor) -> None:
        """Write or add a gradient."""
        place = self._views[name]
        if self._add:
            place.add_(grad)
        else:
            place.copy_(grad)


_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def _flat(module: nn.Module, name: str) -> Iterator[tuple[str, nn.Module]]:
    if any(vars(module).get(hooks) for hooks in _HOOKS):
        raise NotAChain(f"{name or 'the model'} has hooks")
    if type(module) is not nn.Sequential:
        yield name, module
        return
    for key, part in module._modules.items():  # also those which stand there twice
        assert part is not None
        yield from _flat(part, f"{name}.{key}".lstrip("."))


def _layer(name: str, module: Any) -> Layer:  # noqa: ANN401 - told apart by its type
    kind = type(module)
    if kind in ACTIVATIONS:
        return ACTIVATIONS[kind](module)
    if kind is nn.Linear:
        return Linear(_join(name, "weight"), _bias(name, module))
    if kind in _CONVOLUTIONS and module.padding_mode == "zeros":
        return _convolution(name, module)
    if kind is nn.MaxPool2d and not module.return_indices:
        sizes = (module.kernel_size, module.stride, module.padding, module.dilation)
        kernel, stride, padding, dilation = (_pair(size) for size in sizes)
        return MaxPool2d(kernel, stride, padding, dilation, module.ceil_mode)
    if kind is nn.Flatten and (module.start_dim, module.end_dim) == (1, -1):
        return Flatten()
    if kind is KeyedDropout:
        return Dropout(module)
    if isinstance(module, _DropoutNd) and not module.training:
        return ACTIVATIONS[nn.Identity](module)
    raise NotAChain(f"{name or 'the model'} is a {kind.__name__}")


def _convolution(name: str, module: Any) -> Layer:  # noqa: ANN401 - one of three classes
    if isinstance(module.padding, str):
        raise NotAChain(f"{name} pads {module.padding!r}")
    return Convolution(
        _join(name, "weight"),
        _bias(name, module),
        [*module.stride],
        [*module.padding],
        [*module.dilation],
        module.groups,
    )


def _bias(name: str, module: nn.Module) -> str | None:
    return None if module.bias is None else _join(name, "bias")


def _join(name: str, parameter: str) -> str:
    return f"{name}.{parameter}".lstrip(".")


def _pair(size: int | tuple[int, int]) -> list[int]:
    return [size, size] if isinstance(size, int) else [*size]
