"""Whole scenarios, line by line; `pytest tests/peer --rewrite-golden` writes them anew."""

from __future__ import annotations

from pathlib import Path

import pytest
from peer_cases import perform

GOLDEN = sorted((Path(__file__).parent / "golden").glob("*.txt"))


@pytest.mark.parametrize("path", GOLDEN, ids=lambda path: path.stem)
def test_scenario(path, request):
    text = path.read_text(encoding="utf-8")
    done = perform(text)
    if request.config.getoption("--rewrite-golden", default=False):
        path.write_text(done, encoding="utf-8")
    else:
        assert done.splitlines() == text.splitlines()


def test_there_are_scenarios():
    assert len(GOLDEN) >= 10


def test_a_wrong_line_is_noticed():
    text = GOLDEN[0].read_text(encoding="utf-8")
    assert perform(text.replace("  train step=0", "  train step=9")) != text.replace(
        "  train step=0", "  train step=9"
    )
