"""The table of docs/algorithms.md says how large messages and states are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from algorithm_cases import ALL, Build, told

from p2pfl.algorithm import Rows
from p2pfl.algorithms import ALGORITHMS, powergossip
from p2pfl.learning.optim import sgd
from p2pfl.learning.spec import Spec
from p2pfl.learning.tree import leaves

PAGE = Path(__file__).parents[2] / "docs" / "algorithms.md"
D = 50


def table() -> dict[str, list[str]]:
    first, _, _ = PAGE.read_text(encoding="utf-8").partition("\n## ")
    rows = re.findall(r"^\| (`.+?) \|(.+)\|$", first, flags=re.M)
    return {
        name: [cell.strip() for cell in rest.split("|")]
        for names, rest in rows
        for name in re.findall(r"`(\w+)`", names)
    }


def test_the_table_is_complete():
    assert table().keys() == ALGORITHMS.keys()


def cases() -> dict[str, Build]:
    """Return one of each algorithm: of those with a codec, the first."""
    spec = Spec(("weight",), ((5, D // 5),), ("float32",))
    made = {name.split()[0]: build for name, build in reversed(ALL.items())}
    return made | {"powergossip": lambda opt: powergossip(opt, spec)}


@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_messages_and_memory_are_as_told(name):
    _, message, memory, *_ = table()[name]
    a, x = cases()[name](sgd(0.1)), torch.zeros(2, D)
    rows = Rows(torch.arange(2), torch.ones(2).long())
    state = a.init(x, told(rows, torch.ones(2, 2)))  # with one neighbour
    models = sum(leaf.ndim > 1 and leaf.shape[-1] == D for leaf in leaves(state))
    assert models - 1 == int(memory.removesuffix(" for each neighbour"))
    if not re.match(r"\d", message):  # docs/compression.md tells, and tests/codec
        return
    said = a.send(state) if a.needs.weights != "none" else ()
    size = sum(field[:1].nbytes for field in said)
    parts = re.fullmatch(r"(?:(\d+) d)?(?: \+ )?(\d*)", message)
    assert size == int(parts[1] or 0) * D + int(parts[2] or 0)
