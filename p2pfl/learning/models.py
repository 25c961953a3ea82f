"""Models: factories which build an `nn.Module` for a shape of input and a number of outputs.

The parameters of a factory are the keys of its section in an experiment; the result is
called with the shape of one example and the number of outputs. All are initialised by
torch's own defaults, from torch's global generator.
"""

from __future__ import annotations

import importlib
import importlib.util
import math
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType, ModuleType
from typing import Any, Literal

from torch import nn

from p2pfl.errors import UserError
from p2pfl.files import is_file
from p2pfl.learning.checks import require

ModelFactory = Callable[[tuple[int, ...], int], nn.Module]
Activation = Literal["relu", "tanh", "gelu"]

_ACTIVATIONS: Mapping[str, type[nn.Module]] = MappingProxyType(
    {"relu": nn.ReLU, "tanh": nn.Tanh, "gelu": nn.GELU}
)


def linear() -> ModelFactory:
    """One affine map of the flattened input: with a squared loss, linear regression."""

    def build(shape: tuple[int, ...], outputs: int) -> nn.Module:
        return nn.Sequential(nn.Flatten(), nn.Linear(math.prod(shape), outputs))

    return build


def logistic() -> ModelFactory:
    """One affine map of the flattened input: with a cross-entropy, logistic regression.

    >>> sum(p.numel() for p in logistic()((1, 28, 28), 10).parameters())
    7850
    """
    return linear()


def mlp(
    hidden: list[int] = [128, 64],  # noqa: B006 - the signature is the schema; never written to
    activation: Activation = "relu",
    dropout: float = 0.0,
) -> ModelFactory:
    """Fully connected layers on the flattened input.

    Args:
        hidden: the widths of the hidden layers.
        activation: what follows each of them.
        dropout: the share of its units which are dropped in training, in [0, 1).

    >>> sum(p.numel() for p in mlp()((1, 28, 28), 10).parameters())
    109386
    """
    require(all(width >= 1 for width in hidden), "hidden", hidden, "whole numbers >= 1")
    require(0 <= dropout < 1, "dropout", dropout, "in [0, 1)")
    require(activation in _ACTIVATIONS, "activation", activation, f"one of {[*_ACTIVATIONS]}")

    def build(shape: tuple[int, ...], outputs: int) -> nn.Module:
        layers: list[nn.Module] = [nn.Flatten()]
        before = math.prod(shape)
        for width in hidden:
            layers += [nn.Linear(before, width), _ACTIVATIONS[activation]()]
            layers += [nn.Dropout(dropout)] if dropout else []
            before = width
        return nn.Sequential(*layers, nn.Linear(before, outputs))

    return build


def cnn(
    channels: list[int] = [20, 50],  # noqa: B006 - the signature is the schema; never written to
    kernel: int = 5,
    hidden: int = 500,
) -> ModelFactory:
    """Convolutions, each with ReLU and 2 x 2 max-pooling, then one hidden layer.

    Args:
        channels: the channels of each convolution, for images of ``[channels, h, w]``.
        kernel: the sides of its kernel, without padding.
        hidden: the width of the fully connected layer.

    >>> sum(p.numel() for p in cnn()((1, 28, 28), 10).parameters())
    431080
    """
    require(len(channels) > 0 and min(channels) >= 1, "channels", channels, "whole numbers >= 1")
    require(kernel >= 1, "kernel", kernel, "a whole number >= 1")
    require(hidden >= 1, "hidden", hidden, "a whole number >= 1")

    def build(shape: tuple[int, ...], outputs: int) -> nn.Module:
        before, *sides = _image("cnn", shape, len(channels), kernel)
        layers: list[nn.Module] = []
        for width in channels:
            layers += [nn.Conv2d(before, width, kernel), nn.ReLU(), nn.MaxPool2d(2)]
            sides = [(side - kernel + 1) // 2 for side in sides]
            before = width
        flat = before * math.prod(sides)
        head = [nn.Flatten(), nn.Linear(flat, hidden), nn.ReLU(), nn.Linear(hidden, outputs)]
        return nn.Sequential(*layers, *head)

    return build


def lenet() -> ModelFactory:
    """LeNet-5 (LeCun et al. 1998) with padding in front, ReLU and max-pooling.

    >>> sum(p.numel() for p in lenet()((1, 28, 28), 10).parameters())
    61706
    """

    def build(shape: tuple[int, ...], outputs: int) -> nn.Module:
        padded = (*shape[:1], *(side + 4 for side in shape[1:]))
        before, *sides = _image("lenet", padded, 2, 5, padding=2)
        h, w = (((side - 4) // 2 - 4) // 2 for side in sides)
        return nn.Sequential(
            *(nn.Conv2d(before, 6, 5, padding=2), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Conv2d(6, 16, 5), nn.ReLU(), nn.MaxPool2d(2)),
            *(nn.Flatten(), nn.Linear(16 * h * w, 120), nn.ReLU()),
            *(nn.Linear(120, 84), nn.ReLU(), nn.Linear(84, outputs)),
        )

    return build


def load_factory(factory: str, options: dict[str, Any] | None = None) -> ModelFactory:
    """Take the model from the user's own code.

    Args:
        factory: ``"package.module:function"`` or ``"path/to/file.py:function"``. The
            function is called with the shape of one example, the number of outputs and the
            options, and returns an `nn.Module`.
        options: further keyword arguments of that function.

    Raises:
        UserError: if the file, the module or the function is missing, or does not load; on
            building, if what it returns is no module.
    """
    place, colon, name = factory.rpartition(":")
    if not (colon and place and name):
        raise UserError(f"model {factory!r} must be 'module:function' or 'file.py:function'")
    module = _load(place)
    function = getattr(module, name, None)
    if not callable(function):
        found = sorted(key for key, value in vars(module).items() if _is_own(value, module))
        raise UserError(f"{place} has no function {name!r}; it has {', '.join(found) or 'none'}")

    def build(shape: tuple[int, ...], outputs: int) -> nn.Module:
        model = function(shape, outputs, **(options or {}))
        if not isinstance(model, nn.Module):
            raise UserError(f"{factory} returned {type(model).__name__}, not an nn.Module")
        return model

    return build


def _load(place: str) -> ModuleType:
    try:
        return _load_file(Path(place)) if place.endswith(".py") else importlib.import_module(place)
    except (ImportError, SyntaxError) as error:
        raise UserError(f"cannot load {place}: {error}") from error


def _load_file(path: Path) -> ModuleType:
    if not is_file(path):
        raise UserError(f"there is no file {path} to take a model from")
    name = f"p2pfl_user_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise UserError(f"cannot load {path}")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses look their module up while they are made
    spec.loader.exec_module(module)
    return module


def _is_own(value: object, module: ModuleType) -> bool:
    return callable(value) and getattr(value, "__module__", None) == module.__name__


def _image(
    name: str, shape: tuple[int, ...], convolutions: int, kernel: int, padding: int = 0
) -> tuple[int, ...]:
    """Return the shape if so many rounds of convolution and halving leave anything of it."""
    require(len(shape) == 3, "shape", shape, f"[channels, height, width] for {name}")
    least = 1
    for _ in range(convolutions):
        least = 2 * least + kernel - 1
    if min(shape[1:]) < least:
        own, given = least - 2 * padding, " x ".join(str(s - 2 * padding) for s in shape[1:])
        raise ValueError(
            f"{name} needs images of at least {own} x {own}, not {given}: the input is too small"
        )
    return shape


MODELS: Mapping[str, Callable[..., ModelFactory]] = MappingProxyType(
    {
        "linear": linear,
        "logistic": logistic,
        "mlp": mlp,
        "cnn": cnn,
        "lenet": lenet,
        "custom": load_factory,
    }
)
