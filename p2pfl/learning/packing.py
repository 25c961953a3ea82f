"""States as named tensors and plain values, and back: what a checkpoint holds of them.

A state is a tree of tuples and NamedTuples whose leaves are tensors, numbers, truth values,
texts or None. Its outline (which tuples, which names) is not written down: whoever unpacks has a
state of the same run, and no class is ever named in a file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, TypeVar

from torch import Tensor

T = TypeVar("T")
Plain = dict[str, int | float | str | None]  # as JSON can hold them


def pack(state: object) -> tuple[dict[str, Tensor], Plain]:
    """Return the tensors of a state, which are not copied, and its other leaves, by place.

    Raises:
        TypeError: for a leaf of another kind.

    >>> pack((1.5, (None, True)))
    ({}, {'0': 1.5, '1.0': None, '1.1': True})
    """
    tensors: dict[str, Tensor] = {}
    plain: Plain = {}
    for place, leaf in _leaves(state, ""):
        if isinstance(leaf, Tensor):
            tensors[place] = leaf
        elif isinstance(leaf, float) and not math.isfinite(leaf):
            plain[place] = repr(leaf)  # JSON has no number for it
        elif leaf is None or isinstance(leaf, bool | int | float | str):
            plain[place] = leaf
        else:
            raise TypeError(f"{place} of a state is a {type(leaf).__name__}")
    return tensors, plain


def unpack(tensors: Mapping[str, Tensor], plain: Mapping[str, Any], like: T) -> T:
    """Return the state that `pack` was given.

    Args:
        tensors: what `pack` has returned; they are not copied.
        plain: also that.
        like: a state of the same outline. Its values do not matter: tensors may be on the
            meta device.

    Raises:
        ValueError: something is missing, is there too much, or is of another shape or type
            than in `like`; it names the place.
    """
    there, wanted = {*tensors, *plain}, {place for place, _ in _leaves(like, "")}
    if there != wanted:
        raise ValueError(f"{min(there ^ wanted)} is only in one of two states")
    made: T = _unpack(tensors, plain, like, "")
    return made


def _leaves(tree: object, place: str) -> Iterator[tuple[str, object]]:
    if not isinstance(tree, tuple):
        yield place, tree
        return
    for name, part in _parts(tree, place):
        yield from _leaves(part, name)


def _parts(tree: tuple[Any, ...], place: str) -> list[tuple[str, Any]]:
    names = getattr(tree, "_fields", None) or range(len(tree))
    return [
        (f"{place}.{name}" if place else str(name), part)
        for name, part in zip(names, tree, strict=True)
    ]


def _unpack(tensors: Mapping[str, Tensor], plain: Mapping[str, Any], like: Any, place: str) -> Any:  # noqa: ANN401
    if isinstance(like, tuple):
        parts = [_unpack(tensors, plain, part, name) for name, part in _parts(like, place)]
        return type(like)(*parts) if hasattr(like, "_fields") else tuple(parts)
    if isinstance(like, Tensor):
        if place not in tensors:
            raise ValueError(f"{place} is not a tensor")
        found = tensors[place]
        if (found.shape, found.dtype) != (like.shape, like.dtype):
            raise ValueError(f"{place} is {_form(found)}, not {_form(like)}")
        return found
    value = plain.get(place, ...)
    if isinstance(like, float) and value in ("inf", "-inf", "nan"):
        return float(value)
    if type(value) is not type(like):
        raise ValueError(f"{place} = {value!r} is not of type {type(like).__name__}")
    return value


def _form(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} {list(tensor.shape)}"
