from __future__ import annotations

import subprocess
import sys

import pytest

from p2pfl.errors import UserError
from p2pfl.topology import barabasi_albert_graph, complete_graph, draw, exponential_graph


@pytest.mark.parametrize(
    "graph", [complete_graph(1), complete_graph(5), exponential_graph(5), barabasi_albert_graph(80)]
)
def test_pictures_are_png_and_the_same_every_time(tmp_path, graph):
    pytest.importorskip("matplotlib")
    first, second = tmp_path / "a.png", tmp_path / "b.png"
    draw(graph, first, {0: "zero"})
    draw(graph, second, {0: "zero"})
    assert first.read_bytes().startswith(b"\x89PNG")
    assert first.read_bytes() == second.read_bytes()


def test_errors_are_the_user_s(tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"cannot be written"):
        draw(complete_graph(3), tmp_path / "no" / "where.png")
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(UserError, match=r"pip install 'p2pfl-gossip\[plots\]'"):
        draw(complete_graph(3), tmp_path / "a.png")


def test_importing_the_package_is_cheap():
    code = "import sys, p2pfl.topology; print({'scipy', 'matplotlib'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"
