"""How the parameters of a model lie in one flat vector."""

from __future__ import annotations

import hashlib
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parameter import is_lazy

from p2pfl.errors import UserError


class Spec(NamedTuple):
    """The parameters of a model that are trained, in the order the model names them.

    A parameter that is used in several places (tied weights) is there once, under its first
    name. Parameters which do not require a gradient are constants and are not in it.

    >>> spec = Spec.of(nn.Linear(3, 2))
    >>> spec.size, spec.names, spec.shapes
    (8, ('weight', 'bias'), ((2, 3), (2,)))
    >>> {name: tuple(view.shape) for name, view in spec.unflatten(torch.zeros(5, 8)).items()}
    {'weight': (5, 2, 3), 'bias': (5, 2)}
    """

    names: tuple[str, ...]
    shapes: tuple[tuple[int, ...], ...]
    dtypes: tuple[str, ...]  # as torch writes them, without "torch."

    @classmethod
    def of(cls, model: nn.Module) -> Spec:
        """Return the spec of a model.

        Raises:
            UserError: if it has nothing to train, parameters of several types or of a type
                that is not real, or lazy ones that have no shape yet.
        """
        named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
        for name, parameter in named:
            if is_lazy(parameter):
                raise UserError(f"parameter {name} is lazy: give its layer the size of its input")
        dtypes = tuple(str(p.dtype).removeprefix("torch.") for _, p in named)
        if len(set(dtypes)) != 1 or not named[0][1].is_floating_point():
            found = ", ".join(sorted(set(dtypes))) or "none"
            raise UserError(f"a model needs trainable parameters of one real type, not {found}")
        names, shapes = zip(*((name, tuple(p.shape)) for name, p in named), strict=True)
        return cls(names, shapes, dtypes)

    @property
    def sizes(self) -> tuple[int, ...]:
        """The number of values of each parameter."""
        return tuple(torch.Size(shape).numel() for shape in self.shapes)

    @property
    def size(self) -> int:
        """The length d of the flat vector."""
        return sum(self.sizes)

    @property
    def digest(self) -> str:
        """A hexadecimal SHA-256 over names, shapes and types: equal models can be averaged."""
        lines = zip(self.names, self.shapes, self.dtypes, strict=True)
        text = "\n".join(f"{name} {list(shape)} {dtype}" for name, shape, dtype in lines)
        return hashlib.sha256(text.encode()).hexdigest()

    def flatten(self, model: nn.Module) -> Tensor:
        """Return a copy of a model's parameters as one vector ``[d]``."""
        values = dict(model.named_parameters())
        return torch.cat([values[name].detach().reshape(-1) for name in self.names])

    def unflatten(self, vector: Tensor) -> dict[str, Tensor]:
        """Return the parameters in ``[d]`` or ``[rows, d]`` by name, as views: no copies."""
        lead, views, start = vector.shape[:-1], {}, 0
        for name, shape, size in zip(self.names, self.shapes, self.sizes, strict=True):
            views[name] = vector.narrow(-1, start, size).view((*lead, *shape))
            start += size
        return views
