"""Values of experiment keys: which keys a table changes, and values as texts."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping

from p2pfl.experiment.config import Value


def flatten(tables: Mapping[str, Value], above: str = "") -> Iterator[tuple[str, Value]]:
    """Yield the keys that tables change, dotted, and their values.

    A table with a ``name`` is a whole section; one without changes only the keys in it.

    >>> dict(flatten({"pace": {"rounds": 2}, "topology": {"name": "torus", "rows": 2}}))
    {'pace.rounds': 2, 'topology': {'name': 'torus', 'rows': 2}}
    """
    for key, value in tables.items():
        path = f"{above}{key}"
        if isinstance(value, Mapping) and not isinstance(value.get("name"), str):
            yield from flatten(value, f"{path}.")
        else:
            yield path, value


def inline(value: Value) -> str:
    """Return a value as TOML on one line.

    >>> inline({"name": "mlp", "hidden": [64, 32], "bias": True})
    '{"name" = "mlp", "hidden" = [64, 32], "bias" = true}'
    """
    if isinstance(value, Mapping):
        pairs = (f"{quoted(key)} = {inline(part)}" for key, part in value.items())
        return f"{{{', '.join(pairs)}}}"
    if isinstance(value, list | tuple):
        return f"[{', '.join(map(inline, value))}]"
    if isinstance(value, bool):
        return str(value).lower()
    return quoted(value) if isinstance(value, str) else str(value)


def quoted(text: str) -> str:
    """Return a text as TOML, which escapes what JSON does, and DEL."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")


def brief(value: Value) -> str:
    """Return a value as people write it, a section as a text such as ``torus:rows=2``.

    >>> brief({"name": "mlp", "hidden": [64, 32]}), brief(0.1)
    ('mlp:hidden=[64,32]', '0.1')
    """
    if isinstance(value, Mapping):
        pairs = ",".join(f"{key}={brief(part)}" for key, part in value.items() if key != "name")
        name = str(value.get("name", ""))
        return f"{name}:{pairs}" if name and pairs else name or pairs
    if isinstance(value, list | tuple):
        return f"[{','.join(map(brief, value))}]"
    return value if isinstance(value, str) else inline(value)
