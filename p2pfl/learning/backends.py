"""Ways to compute the gradients of a block of rows: one readable, two fast, one suspicious.

A backend takes parameters ``[rows, d]``, a batch of examples ``[rows, b, ...]`` with their
targets ``[rows, b]`` and a key for each row, int64 ``[rows]``. All agree to rounding.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from itertools import chain
from types import MappingProxyType

import torch
from torch import Tensor, nn

from p2pfl.errors import RunError, UserError, first_line
from p2pfl.learning.chain import Into, NotAChain, layers_of, value_and_grad
from p2pfl.learning.losses import Loss
from p2pfl.learning.modules import ModelFailed, Pure, forward
from p2pfl.learning.pieces import BLOCK
from p2pfl.learning.scratch import Scratch
from p2pfl.learning.tree import wide

Batch = tuple[Tensor, Tensor, Tensor]  # examples [rows, b, ...], targets [rows, b], keys [rows]

# What a model that cannot be stacked makes `vmap` raise.
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError, ModelFailed)


class Backend(ABC):
    """Gradients for a block of rows; what all backends have in common.

    Args:
        model: the model as a pure function, of the type it is computed in.
        loss: what is minimised.
        dtype: what gradients are computed in; None: the type of the parameters.

    Attributes:
        reason: in words, how gradients are computed, and why so.
        parallel: whether several threads may call it at once.
        draws: whether the keys matter; else they may be anything.
    """

    reason = ""
    parallel = False  # a module is changed while it is called with other parameters
    draws = True

    def __init__(self, model: Pure, loss: Loss, dtype: torch.dtype | None = None) -> None:
        self.model, self.loss, self.dtype = model, loss, dtype
        self.scratch = Scratch()

    def __call__(self, params: Tensor, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mean loss of each row's batch, ``[rows]``, and its gradient, ``[rows, d]``."""
        losses, grads = self.compute(self.lowered(params), x, y, keys)
        return losses.to(wide(params)), grads.to(params.dtype)

    def descend(self, params: Tensor, batches: Iterable[Batch], factors: Tensor) -> Tensor:
        """Add multiples of the gradient to the parameters, in place, step by step.

        Args:
            params: ``[rows, d]``.
            batches: examples, targets and keys of each step, as above.
            factors: ``[steps, rows, 1]``: minus the learning rate.

        Returns:
            the sum of each row's losses, ``[rows]``.
        """
        total = torch.zeros(len(params), dtype=wide(params), device=params.device)
        for batch, factor in zip(batches, factors, strict=True):
            total += self._descend(params, batch, factor)
        return total

    def _descend(self, params: Tensor, batch: Batch, factor: Tensor) -> Tensor:
        losses, grads = self(params, *batch)
        params.add_(grads.mul_(factor.to(grads.dtype)))
        return losses

    @abstractmethod
    def compute(self, params: Tensor, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Do the work of `__call__`, on parameters of the type it is done in."""

    def lowered(self, params: Tensor) -> Tensor:
        """Return the parameters in the type that gradients are computed in."""
        return params if self.dtype is None else params.to(self.dtype)


class Looped(Backend):
    """One row after the other, with plain autograd: handles any module.

    A model that draws random numbers of its own (dropout inside an LSTM, say) finds
    torch's global generator seeded with the row's key, and the generator is left as it was.
    """

    reason = "one row after the other"

    def __init__(self, model: Pure, loss: Loss, dtype: torch.dtype | None = None) -> None:
        super().__init__(model, loss, dtype)
        self._random: bool | None = None

    def compute(self, params: Tensor, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Loop over the rows."""
        if self._random is None and len(params):
            self._random = draws_by_itself(self.model, params[0], x[0], keys[0])
        losses, grads = [], torch.empty_like(params)
        for i, row in enumerate(zip(params, x, y, keys, strict=True)):
            with seeded(x, int(keys[i]) if self._random else None):
                value, parts = _row_grad(self.model, self.loss, *row)
            torch.cat([part.reshape(-1) for part in parts], out=grads[i])
            losses.append(value)
        return torch.stack(losses) if losses else params.new_empty(0), grads


class Vmapped(Backend):
    """All rows stacked by `torch.func.vmap`."""

    reason = "rows stacked by vmap"

    def compute(self, params: Tensor, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Stack the rows, and lay their gradients end to end."""
        losses, parts = self._stacked(params, x, y, keys)
        grads, spec = torch.empty_like(params), self.model.spec
        sizes = zip(spec.names, spec.sizes, strict=True)
        torch.cat([parts[name].reshape(len(params), size) for name, size in sizes], 1, out=grads)
        return losses, grads

    def _descend(self, params: Tensor, batch: Batch, factor: Tensor) -> Tensor:
        # The gradients go where they belong, without being laid end to end first.
        losses, parts = self._stacked(self.lowered(params), *batch)
        for name, place in self.model.spec.unflatten(params).items():
            part = parts[name].to(params.dtype)
            place.addcmul_(part, factor.to(part.dtype).view(-1, *[1] * (part.ndim - 1)))
        return losses.to(wide(params))

    def _stacked(
        self, params: Tensor, x: Tensor, y: Tensor, keys: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        stacked = torch.func.vmap(torch.func.grad_and_value(self._mean_loss))
        parts, losses = stacked(self.model.spec.unflatten(params), x, y, keys)
        return losses.detach(), {name: part.detach() for name, part in parts.items()}

    def _mean_loss(self, params: dict[str, Tensor], x: Tensor, y: Tensor, key: Tensor) -> Tensor:
        return self.loss.each(forward(self.model, params, key, x), y).mean()


class Stacked(Backend):
    """Forward and backward pass written out for chains of well-known layers.

    Plain gradient steps go straight into the parameters: no gradient is ever stored.

    Raises:
        UserError: the model is no such chain.
    """

    def __init__(self, model: Pure, loss: Loss, dtype: torch.dtype | None = None) -> None:
        super().__init__(model, loss, dtype)
        try:
            self._layers = layers_of(model)
        except NotAChain as error:
            message = f"training.backend = 'stacked' cannot take this model: {error}"
            raise UserError(message) from error
        if loss.derivative is None:
            raise UserError(f"training.backend = 'stacked' cannot take the loss {loss.name}")
        self.reason = f"{len(self._layers)} layers stacked by hand"
        self.parallel, self.draws = True, bool(model.dropouts)

    def compute(self, params: Tensor, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Write every gradient to its place."""
        spec, grads = self.model.spec, torch.empty_like(params)
        sink = Into(spec.unflatten(grads), add=False)
        views = spec.unflatten(params)
        return value_and_grad(self._layers, self.loss, views, (x, y, keys), sink), grads

    def descend(self, params: Tensor, batches: Iterable[Batch], factors: Tensor) -> Tensor:
        """Add every gradient to its parameters as it is computed."""
        spec = self.model.spec
        places = spec.unflatten(params)
        sink = Into(places, add=True, scratch=self.scratch)
        total = torch.zeros(len(params), dtype=wide(params), device=params.device)
        for batch, factor in zip(batches, factors, strict=True):
            views = places
            if self.dtype is not None:  # layer by layer, so that each lies in one piece
                views = {name: place.to(self.dtype) for name, place in places.items()}
            total += value_and_grad(self._layers, self.loss, views, batch, sink, factor)
        return total


class Debug(Looped):
    """`Looped`, with everything checked; slow.

    Raises:
        RunError: if a shape is wrong, or an example, a parameter, a loss or a gradient is
            not finite; it names the row and the parameter.
    """

    reason = "one row after the other, everything checked"

    def compute(self, params: Tensor, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Check, loop, and check again."""
        _check_shapes(self.model, self.loss, params, x, y, keys)
        _check_finite("examples", x)
        _check_named(self.model, "parameter", params)
        losses, grads = super().compute(params, x, y, keys)
        _check_finite("loss", losses)
        _check_named(self.model, "gradient of parameter", grads)
        return losses, grads


class Auto(Backend):
    """The fastest backend that can take the model and agrees with `Looped` on a first batch.

    `Stacked` for chains of well-known layers, else `Vmapped`, else `Looped`. What `vmap`
    makes of convolutions is slower on a CPU than a loop. A single row of a model that is no
    chain is always looped: stacking gains nothing there, and a peer process that trains
    only its own row never pays for loading the compiler behind `vmap`.
    """

    def __init__(self, model: Pure, loss: Loss, dtype: torch.dtype | None = None) -> None:
        super().__init__(model, loss, dtype)
        self.reason = f"{Looped.reason}: so far there was one at a time"
        self._looped = Looped(model, loss, dtype)
        self._chosen: Backend | None = None
        try:
            self._stacked: Stacked | None = Stacked(model, loss, dtype)
            self._refusal = ""
        except UserError as error:
            self._stacked, self._refusal = None, str(error).partition(": ")[2]

    def compute(self, params: Tensor, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Have the chosen backend do it."""
        return self._backend(params, x, y, keys)(params, x, y, keys)

    def descend(self, params: Tensor, batches: Iterable[Batch], factors: Tensor) -> Tensor:
        """Make plain gradient steps, as any backend."""
        if self._chosen is None:
            steps = iter(batches)
            first = next(steps)
            backend, batches = self._backend(params, *first), chain([first], steps)
            return backend.descend(params, batches, factors)
        return self._chosen.descend(params, batches, factors)

    def _backend(self, params: Tensor, *batch: Tensor) -> Backend:
        if self._chosen is None:
            if not len(params) or (len(params) == 1 and self._stacked is None):
                return self._looped
            rows = slice(0, 2)
            self._chosen, self.reason = self._choose(params[rows], *(b[rows] for b in batch))
            self.parallel, self.draws = self._chosen.parallel, self._chosen.draws
        return self._chosen

    def _choose(self, *batch: Tensor) -> tuple[Backend, str]:
        found: Backend
        if self._stacked is not None:
            found, why = self._stacked, self._stacked.reason
        elif _convolves(self.model) and batch[0].device.type == "cpu":
            return self._looped, f"{Looped.reason}: {self._refusal}, and it convolves on a CPU"
        else:
            found = Vmapped(self.model, self.loss, self.dtype)
            why = f"{found.reason}: {self._refusal}"
        expected = self._looped(*batch)
        try:
            results = found(*batch)
        except REFUSALS as error:
            why = first_line(error.__cause__ or error)
            return self._looped, f"{Looped.reason}: vmap refused the model ({why})"
        dtype = self.dtype or batch[0].dtype
        pairs = zip(results, expected, strict=True)
        if not all(close(one, two, dtype) for one, two in pairs):
            name = type(found).__name__.lower()
            return self._looped, f"{Looped.reason}: {name} gave other numbers on a first batch"
        return found, why


def close(one: Tensor, two: Tensor, dtype: torch.dtype | None = None) -> bool:
    """Tell whether two results of the same sums in another order, in `dtype`, agree."""
    tolerance = torch.finfo(dtype or one.dtype).eps ** 0.5
    pairs = [*zip(*(torch.split(each.flatten(), BLOCK) for each in (one, two)), strict=True)]
    sizes = (part.nan_to_num().abs().amax().item() for _, part in pairs if part.numel())
    largest = max(sizes, default=0.0)
    within = partial(torch.allclose, rtol=tolerance, atol=tolerance * largest, equal_nan=True)
    return all(within(*pair) for pair in pairs)


def draws_by_itself(model: Pure, vector: Tensor, x: Tensor, key: Tensor) -> bool:
    """Tell whether the outputs in training depend on torch's global generator."""
    params = model.spec.unflatten(vector)
    with torch.no_grad():
        found = []
        for seed in (1, 2):
            with seeded(x, seed):
                found.append(forward(model, params, key, x))
    return not torch.equal(found[0].nan_to_num(), found[1].nan_to_num())


def _row_grad(
    model: Pure, loss: Loss, vector: Tensor, x: Tensor, y: Tensor, key: Tensor
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Return the loss of one row and the gradient of each of its parameters.

    The leaves are the parameters and not the vector: the gradient of a slice of a vector
    would be a whole vector of zeros for every one of them.
    """
    views = model.spec.unflatten(vector.detach())
    leaves = {name: view.requires_grad_() for name, view in views.items()}
    with torch.enable_grad():
        value = loss.each(forward(model, leaves, key, x), y).mean()
        parts = torch.autograd.grad(value, [*leaves.values()], materialize_grads=True)
    return value.detach(), parts


@contextmanager
def seeded(x: Tensor, seed: int | None) -> Iterator[None]:
    """Seed torch's generators for a while, those of the device of `x`; None does nothing."""
    if seed is None:
        yield
        return
    kind = x.device.type
    devices = [] if kind == "cpu" else [x.device.index or 0]
    with torch.random.fork_rng(devices, device_type=kind):
        torch.manual_seed(seed)
        yield


def _check_shapes(
    model: Pure, loss: Loss, params: Tensor, x: Tensor, y: Tensor, keys: Tensor
) -> None:
    rows, d = params.shape
    if d != model.spec.size:
        raise RunError(f"rows of {d} parameters for a model of {model.spec.size}")
    if not len(x) == len(y) == len(keys) == rows or x.shape[1] != y.shape[1]:
        shapes = [tuple(block.shape) for block in (params, x, y, keys)]
        raise RunError(f"parameters, examples, targets and keys do not fit: {shapes}")
    for i in range(rows):
        with torch.no_grad():
            outputs = forward(model, model.spec.unflatten(params[i]), keys[i], x[i])
            each = loss.each(outputs, y[i])
        if each.shape != y[i].shape[:1]:
            found = f"{tuple(each.shape)} from outputs {tuple(outputs.shape)}"
            raise RunError(f"the loss of {len(y[i])} examples has shape {found}")


def _check_finite(what: str, values: Tensor) -> None:
    wrong = ~values.isfinite()
    if wrong.any():
        row = int(wrong.flatten(1).any(1).nonzero()[0]) if wrong.ndim > 1 else int(wrong.argmax())
        raise RunError(f"the {what} of row {row} is not finite")


def _check_named(model: Pure, what: str, rows: Tensor) -> None:
    for name, values in model.spec.unflatten(rows).items():
        _check_finite(f"{what} {name}", values)


def _convolves(model: Pure) -> bool:
    kinds = (nn.Conv1d, nn.Conv2d, nn.Conv3d)
    return any(isinstance(module, kinds) for module in model.training.modules())


BackendFactory = Callable[[Pure, Loss, torch.dtype | None], Backend]

BACKENDS: Mapping[str, BackendFactory] = MappingProxyType(
    {"auto": Auto, "stacked": Stacked, "vmapped": Vmapped, "looped": Looped, "debug": Debug}
)
