"""The table of docs/algorithms.md says how large messages and states are."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from algorithm_cases import PLAIN

from p2pfl.algorithm import Rows
from p2pfl.algorithms import ALGORITHMS
from p2pfl.learning.optim import sgd
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


@pytest.mark.parametrize("name", sorted(ALGORITHMS.keys() - {"choco"}))
def test_messages_and_memory_are_as_told(name):
    _, message, memory, *_ = table()[name]
    a, x = PLAIN[name](sgd(0.1)), torch.zeros(1, D)
    state = a.init(x, Rows(torch.arange(1), torch.ones(1).long()))
    models = sum(leaf.shape[1] == D for leaf in leaves(state))
    assert models - 1 == int(memory)
    size = sum(field.nbytes for field in a.send(state)) if a.needs.weights != "none" else 0
    parts = re.fullmatch(r"(?:(\d+) d)?(?: \+ )?(\d*)", message)
    assert size == int(parts[1] or 0) * D + int(parts[2] or 0)
