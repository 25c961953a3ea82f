"""What makes any `nn.Module` a pure function of parameters, a key and examples.

Three things stand in the way, and each has a rule:

- *Dropout* draws from a global generator. It is replaced by `KeyedDropout`, which draws
  from a key, so that a row drops the same units in every runtime and backend.
- *Batch normalisation* keeps running statistics. They are not parameters and are not
  exchanged: training normalises by the batch, and for evaluation the statistics are
  estimated again from the node's own data at the current parameters, as in precise
  BatchNorm (Wu and Johnson 2021, *Rethinking "Batch" in BatchNorm*).
- *Other buffers* are constants, equal at every node; what a forward pass writes into them
  is forgotten. So are parameters which do not require a gradient.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from p2pfl import rng
from p2pfl.errors import UserError, first_line
from p2pfl.learning.spec import Spec

_WHOLE_CHANNELS = (nn.Dropout1d, nn.Dropout2d, nn.Dropout3d)


class ModelFailed(UserError):
    """The forward pass of a model has raised something."""


class KeyedDropout(nn.Module):
    """Dropout whose mask is drawn from a key: `layer` and the call are folded into it.

    The key, int64 and without dimensions, is the buffer ``key``, which a caller replaces
    through `functional_call`.
    """

    key: Tensor

    def __init__(self, p: float, layer: int, whole_channels: bool = False) -> None:
        super().__init__()
        self.p, self.layer, self.whole_channels = p, layer, whole_channels
        self.calls = 0  # within one forward pass; `forward` sets it back
        self.register_buffer("key", torch.zeros((), dtype=torch.int64), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Drop each unit (or whole channel) with probability p and scale up the others."""
        if not self.training or self.p == 0:
            return x
        if self.p == 1:
            return x * 0.0
        key = rng.fold(rng.fold(self.key, self.layer), self.calls)
        self.calls += 1
        shape = x.shape[:2] + (1,) * (x.ndim - 2) if self.whole_channels else x.shape
        mask = rng.uniform(key, shape.numel()).reshape(shape) >= self.p
        return x * (mask.to(x.dtype) / (1 - self.p))


@dataclass(frozen=True, slots=True)
class Pure:
    """A model made pure: copies of its structure, in which what is trained takes no memory.

    Attributes:
        spec: how its parameters lie in one vector.
        training: keyed dropout, normalisation by the batch.
        evaluating: in evaluation mode, otherwise as the user built it.
        pattern: the same, never called: a forward pass may leave something in a module.
        estimating: collects the statistics of batch normalisation; None without such.
        dropouts: the names of the buffers which take the key.
        statistics: the names of the buffers which `estimate_buffers` estimates.
    """

    spec: Spec
    training: nn.Module
    evaluating: nn.Module
    pattern: nn.Module
    estimating: nn.Module | None
    dropouts: tuple[str, ...]
    statistics: tuple[str, ...]


def pure(model: nn.Module) -> Pure:
    """Return a model as pure functions; the model itself is left as it is.

    Raises:
        UserError: if the model cannot be trained as one vector, or holds alpha dropout.
    """
    spec = Spec.of(model)
    training = _copy(model).train()
    for layer, (name, module) in enumerate(_of_kind(training, _DropoutNd)):
        training = _replace(training, name, _keyed(name, module, layer))
    statistics = []
    for name, module in _of_kind(training, _NormBase):
        statistics += [f"{name}.{buffer}".lstrip(".") for buffer, _ in module.named_buffers()]
        module.track_running_stats = False
        module.running_mean = module.running_var = module.num_batches_tracked = None
    dropouts = [f"{name}.key".lstrip(".") for name, _ in _of_kind(training, KeyedDropout)]
    estimating = _estimator(model) if statistics else None
    evaluating, pattern = _copy(model).eval(), _copy(model).eval()
    buffers = tuple(dropouts), tuple(statistics)
    return Pure(spec, training, evaluating, pattern, estimating, *buffers)


def forward(model: Pure, params: dict[str, Tensor], key: Tensor, x: Tensor) -> Tensor:
    """Return the outputs ``[b, k]`` of a row in training, for examples ``[b, ...]``.

    `params` are those of one row, as `Spec.unflatten` names them; `key` has no dimension.
    """
    for module in model.training.modules():
        if isinstance(module, KeyedDropout):
            module.calls = 0
    values = params | _constants(model.training) | dict.fromkeys(model.dropouts, key)
    return _called(model.training, values, x, "training")


def predict(
    model: Pure, params: dict[str, Tensor], buffers: dict[str, Tensor], x: Tensor
) -> Tensor:
    """Return the outputs ``[b, k]`` of a row in evaluation, with its estimated buffers."""
    return _called(model.evaluating, params | buffers, x, "evaluation")


def estimate_buffers(model: Pure, params: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
    """Return the statistics of a row's normalisations over examples ``[b, ...]``, as one batch.

    The variances are unbiased, as those that torch keeps. Without batch normalisation there
    are none.
    """
    if model.estimating is None:
        return {}
    buffers = _constants(model.estimating)
    with torch.no_grad():  # the forward pass writes into the buffers it is given
        _called(model.estimating, params | buffers, x, "evaluation")
    return {name: buffers[name] for name in model.statistics}


def assemble(model: Pure, params: dict[str, Tensor], buffers: dict[str, Tensor]) -> nn.Module:
    """Return a plain module in evaluation mode, with copies of a row's values in it."""
    made = copy.deepcopy(model.pattern)
    values = params | buffers
    with torch.no_grad():
        for name, place in [*made.named_parameters(), *made.named_buffers()]:
            if name in values:
                place.copy_(values[name])
    return made


def _called(module: nn.Module, values: dict[str, Tensor], x: Tensor, when: str) -> Tensor:
    """Call a module with other values; what it raises is told as the model's."""
    try:
        outputs: Tensor = functional_call(module, values, (x,))
    except Exception as error:  # it may be the user's own code
        raise ModelFailed(f"model: in {when}, {first_line(error)}") from error
    return outputs


def _copy(model: nn.Module) -> nn.Module:
    """Copy the structure and the buffers, share what is frozen, and hold nothing that is trained.

    Callers replace what is trained. Where a module has kept it elsewhere as well, so that they
    cannot, it finds NaN.
    """
    memo: dict[int, Any] = {id(p): _stand_in(p) for p in model.parameters()}
    return copy.deepcopy(model, memo)


def _stand_in(parameter: nn.Parameter) -> nn.Parameter:
    if not parameter.requires_grad:
        return parameter
    return nn.Parameter(parameter.detach().new_full((), math.nan).expand(parameter.shape))


def _estimator(model: nn.Module) -> nn.Module:
    made = _copy(model).eval()
    for _, module in _of_kind(made, _NormBase):
        if module.track_running_stats:
            module.train()
            module.momentum = 1.0  # the last batch is all that counts
    return made


def _constants(module: nn.Module) -> dict[str, Tensor]:
    """Return copies of the buffers, so that what is written into them is forgotten."""
    return {name: buffer.clone() for name, buffer in module.named_buffers()}


def _of_kind(module: nn.Module, kind: type[Any]) -> Iterator[tuple[str, Any]]:
    return ((name, part) for name, part in [*module.named_modules()] if isinstance(part, kind))


def _keyed(name: str, module: nn.Module, layer: int) -> KeyedDropout:
    if isinstance(module, nn.AlphaDropout | nn.FeatureAlphaDropout):
        raise UserError(f"{type(module).__name__} ({name}) cannot be drawn by key: use Dropout")
    whole = isinstance(module, _WHOLE_CHANNELS)
    p = getattr(module, "p", 0.5)
    return KeyedDropout(float(p), layer, whole).train()


def _replace(root: nn.Module, name: str, module: nn.Module) -> nn.Module:
    """Put `module` where `name` says, everywhere the module there is used; return the root."""
    old = root.get_submodule(name)
    if old is root:
        return module
    for parent in root.modules():
        for key, child in [*parent._modules.items()]:  # also what stands there twice
            if child is old:
                setattr(parent, key, module)
    return root
