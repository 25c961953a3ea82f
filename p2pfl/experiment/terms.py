"""What all peers of a run must agree on, spelled out so that a difference has a name."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping

from p2pfl import __version__
from p2pfl.experiment.config import Value
from p2pfl.learning.task import ModelTask
from p2pfl.topology.schedule import Topology

# These concern one peer, or the emulator.
PRIVATE = ("name", "base", "evaluation", "network", "output", "checkpoint")


def terms(tables: Mapping[str, Value], topology: Topology, task: ModelTask) -> dict[str, str]:
    """Return the values of an experiment by key, and digests of what files and code say.

    Args:
        tables: the experiment, every default spelled out.
        topology: its links are compared, wherever they were read from.
        task: the names and shapes of its parameters are compared.
    """
    flat: dict[str, str] = {"version": ".".join(__version__.split(".")[:2])}
    for key, value in _flatten({k: v for k, v in tables.items() if k not in PRIVATE}):
        # Where a peer keeps its files is its own business; what they say is compared.
        kept_at = key.split(".")[-1] in ("path", "factory")
        flat[key] = str(value).rpartition("/")[2] if kept_at else str(value)
    flat["model.parameters"] = f"{task.d} ({task.spec.digest[:12]})"
    links = b"".join(part.numpy().tobytes() for links in topology.rounds() for part in links[:2])
    flat["topology.links"] = hashlib.sha256(links).hexdigest()[:12]
    return flat


def _flatten(value: Value, path: str = "") -> Iterable[tuple[str, Value]]:
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield from _flatten(part, f"{path}.{key}" if path else str(key))
    else:
        yield path, value
