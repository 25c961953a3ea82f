"""Ways to compute the gradients of a block of rows: one readable, one fast, one suspicious.

A backend takes parameters ``[rows, d]``, a batch of examples ``[rows, b, ...]`` with their
targets ``[rows, b]`` and a key for each row, int64 ``[rows]``, and returns the mean loss of
each row's batch, ``[rows]``, and its gradient, ``[rows, d]``. All agree to rounding.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import MappingProxyType

import torch
from torch import Tensor

from p2pfl.errors import RunError
from p2pfl.learning.losses import Loss
from p2pfl.learning.modules import Pure, forward

Backend = Callable[[Tensor, Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]
BackendFactory = Callable[[Pure, Loss], Backend]

BLOCK_BYTES = 16 << 20  # parameters trained together: more of them leave the cache
LEAST_ROWS = 8  # below which stacking gains nothing, whatever the cache

# What a model that cannot be stacked makes `vmap` raise.
REFUSALS = (RuntimeError, ValueError, TypeError, IndexError, AttributeError, KeyError)


def looped(model: Pure, loss: Loss) -> Backend:
    """One row after the other, with plain autograd: handles any module.

    A model that draws random numbers of its own (dropout inside an LSTM, say) finds
    torch's global generator seeded with the row's key, and the generator is left as it was.
    """
    random: bool | None = None

    def grad(params: Tensor, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        nonlocal random
        if random is None and len(params):
            random = draws_by_itself(model, params[0], x[0], keys[0])
        losses, grads = [], torch.empty_like(params)
        for i, row in enumerate(zip(params, x, y, keys, strict=True)):
            with _seeded(x, int(keys[i]) if random else None):
                value, parts = _row_grad(model, loss, *row)
            torch.cat([part.reshape(-1) for part in parts], out=grads[i])
            losses.append(value)
        return torch.stack(losses) if losses else params.new_empty(0), grads

    return grad


def vmapped(model: Pure, loss: Loss, block_bytes: int = BLOCK_BYTES) -> Backend:
    """All rows stacked by `torch.func.vmap`, a cache-sized block of them at a time."""

    def mean_loss(params: dict[str, Tensor], x: Tensor, y: Tensor, key: Tensor) -> Tensor:
        return loss.each(forward(model, params, key, x), y).mean()

    def grad(params: Tensor, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        stacked = torch.func.vmap(torch.func.grad_and_value(mean_loss))
        losses, grads = params.new_empty(len(params)), torch.empty_like(params)
        for block in blocks(params, block_bytes):
            views = model.spec.unflatten(params[block])
            parts, losses[block] = stacked(views, x[block], y[block], keys[block])
            flat = [parts[name].flatten(1) for name in model.spec.names]
            torch.cat([part.detach() for part in flat], 1, out=grads[block])
        return losses, grads

    return grad


def debug(model: Pure, loss: Loss) -> Backend:
    """`looped`, with everything checked; slow.

    Raises:
        RunError: if a shape is wrong, or an example, a parameter, a loss or a gradient is
            not finite; it names the row and the parameter.
    """
    inner = looped(model, loss)

    def grad(params: Tensor, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        _check_shapes(model, loss, params, x, y, keys)
        _check_finite("examples", x)
        _check_named(model, "parameter", params)
        losses, grads = inner(params, x, y, keys)
        _check_finite("loss", losses)
        _check_named(model, "gradient of parameter", grads)
        return losses, grads

    return grad


class Auto:
    """`vmapped` where that works and agrees with `looped` on a first batch, else `looped`.

    A single row is always looped: stacking gains nothing there, and a peer process that
    trains only its own row never pays for loading the compiler behind `vmap`.

    Attributes:
        reason: in words, which of the two is used for several rows, and why.
    """

    def __init__(self, model: Pure, loss: Loss) -> None:
        self.reason = "not tried yet: so far there was one row at a time"
        self._looped, self._vmapped = looped(model, loss), vmapped(model, loss)
        self._stacked: bool | None = None

    def __call__(self, params: Tensor, x: Tensor, y: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        """Return losses and gradients, as any backend."""
        if len(params) <= 1:
            return self._looped(params, x, y, keys)
        if self._stacked is None:
            self._stacked, self.reason = self._probe(params[:2], x[:2], y[:2], keys[:2])
        return (self._vmapped if self._stacked else self._looped)(params, x, y, keys)

    def _probe(self, *batch: Tensor) -> tuple[bool, str]:
        expected = self._looped(*batch)
        try:
            found = self._vmapped(*batch)
        except REFUSALS as error:
            return False, f"looped: vmap refused the model ({_first_line(error)})"
        if not all(close(one, two) for one, two in zip(found, expected, strict=True)):
            return False, "looped: vmap gave other numbers on a first batch"
        return True, "vmapped: it works and agrees with looped on a first batch"


def auto(model: Pure, loss: Loss) -> Auto:
    """Choose between `looped` and `vmapped` at the first batch of several rows."""
    return Auto(model, loss)


def blocks(params: Tensor, block_bytes: int = BLOCK_BYTES) -> Iterator[slice]:
    """Cut rows ``[rows, d]`` into slices whose parameters fill about so many bytes."""
    row_bytes = params.shape[1] * params.element_size()
    size = max(LEAST_ROWS, block_bytes // max(row_bytes, 1))
    return (slice(i, i + size) for i in range(0, len(params), size))


def close(one: Tensor, two: Tensor) -> bool:
    """Tell whether two results of the same sums in another order agree."""
    tolerance = torch.finfo(one.dtype).eps ** 0.5
    largest = two.nan_to_num().abs().amax().item() if two.numel() else 0.0
    return torch.allclose(one, two, rtol=tolerance, atol=tolerance * largest, equal_nan=True)


def draws_by_itself(model: Pure, vector: Tensor, x: Tensor, key: Tensor) -> bool:
    """Tell whether the outputs in training depend on torch's global generator."""
    params = model.spec.unflatten(vector)
    with torch.no_grad():
        found = []
        for seed in (1, 2):
            with _seeded(x, seed):
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
def _seeded(x: Tensor, seed: int | None) -> Iterator[None]:
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


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


BACKENDS: Mapping[str, BackendFactory] = MappingProxyType(
    {"auto": auto, "looped": looped, "vmapped": vmapped, "debug": debug}
)
