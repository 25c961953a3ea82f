"""Write docs/reference.md: every section of an experiment file, read off the code itself.

Usage:  python scripts/write_reference.py [--check]

With --check nothing is written; the exit code says whether the file is up to date.
"""

from __future__ import annotations

import collections.abc
import inspect
import re
import sys
import types
import typing
from collections.abc import Collection
from pathlib import Path
from typing import Any

from p2pfl.aggregation import AGGREGATIONS, Aggregation
from p2pfl.attacks import ATTACKS, Attack
from p2pfl.codec import CODECS, Codec
from p2pfl.experiment.config import Kind, parameters
from p2pfl.experiment.reading import FOLLOWED
from p2pfl.experiment.sections import DEFAULTS, SECTIONS
from p2pfl.learning.optim import Optimiser
from p2pfl.learning.schedules import SCHEDULES, Schedule
from p2pfl.peer.stopping import STOP_RULES, StopRule

TARGET = Path(__file__).parents[1] / "docs" / "reference.md"

HEAD = """\
# Reference: the experiment file

An experiment is one TOML file. At the top stand `name` (of run folders; by default that of the
file), `seed` (draws everything that has no seed of its own; 0), `nodes` (how many peers; by default
as many as the topology or the data files say, else 8) and `base` (the folder that relative paths
start from; by default that of the file). Below them come the sections on this page; each may be
left out. A section is a call: `name` says of what, the other keys are its arguments. Where a
section is wanted, a text such as `"torus:rows=4,cols=6"` does as well, and a section may stand
inside a section:

```toml
algorithm = { name = "choco", gamma = 0.3, codec = { name = "top_k", share = 0.1 } }
```

An unknown key, a wrong type or a combination that cannot work is an error that names the key,
the value and the choices. `--set pace.rounds=5` on the command line changes a key of any
experiment. This page is written by `scripts/write_reference.py` from the code.
"""

INTRODUCTIONS = {
    "data": "What is learned from. Relative paths start at `--data DIR`, or at the file's folder.",
    "holdout": "Which examples are for testing.",
    "partition": "Who holds which training examples; names and arguments as in flwr-datasets.",
    "preprocess": "How numeric features are standardised.",
    "model": "What is trained.",
    "training": "How a peer trains.",
    "optimiser": "How gradients become steps.",
    "membership": "How peers find out who is there; see membership.md.",
    "churn": "What happens to peers and links while a run goes on; see churn.md. Times are seconds,"
    ' or texts such as `"2m"`.',
    "checkpoint": "When a run writes down what it needs to go on after it was killed; see"
    " checkpoints.md.",
    "attackers": "Who lies to the others, and how; see robustness.md. By default nobody.",
    "algorithm": "What is exchanged, and what is made of it.",
    "topology": 'Who talks to whom. A path stands for `{ name = "file", path = ... }`.',
    "mixing": "How much a receiver takes of a sender; the default follows from the algorithm.",
    "pace": "How long it goes on, and how long peers wait for each other.",
    "evaluation": "When and on what models are measured.",
    "network": "For `--on emulate`: the modelled network and nodes. See also network files.",
    "output": "What a run leaves.",
}


SECTION_TYPES = {
    Aggregation: "aggregation rule",
    Attack: "attack",
    Codec: "codec",
    Optimiser: "optimiser",
    Schedule: "schedule",
    StopRule: "stopping rule",
}


def section(key: str, kind: Kind) -> str:
    """Return the chapter on one section."""
    lines = [f"## `{key}`", "", INTRODUCTIONS[key], ""]
    default = DEFAULTS.get(key, {"name": kind.default})
    if default["name"]:
        others = [f"`{k} = {v}`" for k, v in default.items() if k != "name"]
        told = " with ".join([f"`{default['name']}`", *others])
        lines += [f"Default: {told}.", ""]
    for name, factory in sorted(kind.table.items()):
        lines += entry(name, factory, kind, FOLLOWED if key == "algorithm" else ())
    return "\n".join(lines)


def entry(
    name: str,
    factory: Any,  # noqa: ANN401
    kind: Kind,
    followed: tuple[str, ...] = (),
) -> list[str]:
    """Return what is said of one factory."""
    known = parameters(factory, kind.given, kind.told)
    hints = typing.get_type_hints(factory)
    lines = [f"### `{name}`", ""] if name else []
    names = inspect.signature(factory).parameters
    lines += [prose(inspect.getdoc(factory) or "", names), ""]
    if known:
        lines += ["| key | type | default |", "|---|---|---|"]
        for parameter in known.values():
            typed = readable(hints[parameter.name]).replace("|", "\\|")
            empty = parameter.default is inspect.Parameter.empty
            needed = "*of the experiment*" if parameter.name in followed else "*must be given*"
            default = needed if empty else f"`{parameter.default!r}`"
            lines.append(f"| `{parameter.name}` | `{typed}` | {default} |")
        lines.append("")
    return lines


def readable(hint: Any) -> str:  # noqa: ANN401
    """Return a type as one would write its values down."""
    for made, words in SECTION_TYPES.items():
        if hint == made or typing.get_origin(hint) is made:
            return words
    arguments = typing.get_args(hint)
    origin = typing.get_origin(hint)
    if origin in (typing.Union, types.UnionType):
        return " | ".join(dict.fromkeys(map(readable, arguments)))
    if origin is typing.Literal:
        return " | ".join(map(repr, arguments))
    if origin in (list, tuple):
        return f"list of {readable(arguments[0])}"
    if origin in (dict, collections.abc.Mapping):
        return f"table of {readable(arguments[1])}"
    return "nothing" if hint is type(None) else getattr(hint, "__name__", str(hint))


def prose(text: str, names: Collection[str]) -> str:
    """Return a docstring as Markdown; what it says of parameters, by their names, is a list."""
    text = re.split(r"\n(?:Returns|Raises|Example)s?:|\n>>> ", text)[0].rstrip()
    text = re.sub(r"``(.+?)``", r"`\1`", text)
    head, args, rest = text.partition("\nArgs:\n")
    if not args:
        return text
    items = re.sub(r"\n {8,}", " ", "\n" + inspect.cleandoc(" " * 4 + rest.lstrip()))
    items = re.sub(rf"\n\s*({'|'.join(names)}): ", r"\n- `\1`: ", items)
    return f"{head.rstrip()}\n{items}"


def page() -> str:
    """Return the whole page."""
    chapters = [section(key, kind) for key, kind in SECTIONS.items()]
    chapters.append("# Sections inside sections\n")
    for title, table in (
        ("Aggregation rules, in `algorithm.aggregate`", AGGREGATIONS),
        ("Attacks, in `attackers.attack`", ATTACKS),
        ("Codecs, in `algorithm.codec`", CODECS),
        ("Learning-rate schedules, in `optimiser.lr`", SCHEDULES),
        ("Stopping rules, in `pace.stop`", STOP_RULES),
    ):
        lines = [f"## {title}", ""]
        for name, factory in sorted(table.items()):
            lines += entry(name, factory, Kind({}))
        chapters.append("\n".join(lines))
    return HEAD + "\n" + "\n".join(chapters).rstrip() + "\n"


if __name__ == "__main__":
    if "--check" in sys.argv:
        sys.exit(TARGET.read_text(encoding="utf-8") != page())
    TARGET.write_text(page(), encoding="utf-8")
    print(f"written: {TARGET}")
