"""Imports point one way only, towards the ground; the order stands in pyproject.toml."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def test_the_order_of_imports_holds():
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-2000:]


@pytest.mark.parametrize(
    ("module", "never"),
    [
        ("p2pfl", {"torch", "networkx", "zmq"}),
        ("p2pfl.cli", {"torch", "sklearn", "matplotlib", "pandas"}),
        ("p2pfl.security.roster", {"torch", "networkx"}),
        ("p2pfl.fleet.control", {"torch", "numpy", "networkx", "zmq"}),
        ("p2pfl.fleet.remote", {"torch", "numpy", "asyncssh"}),
        ("p2pfl.peer.rounds", {"zmq", "sklearn", "msgpack"}),
        ("p2pfl.launch.local", {"sklearn", "matplotlib", "pandas", "torch._dynamo"}),
    ],
)
def test_importing_takes_along_only_what_is_needed(module, never):
    code = f"import sys, {module}; print(sorted({never} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
