"""Nothing that arrives or is loaded can execute; read off the source itself."""

import ast
from pathlib import Path

import pytest

SOURCES = sorted((Path(__file__).parents[1] / "p2pfl").rglob("*.py"))
BANNED_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "shelve", "marshal"}
BANNED_CALLS = {"eval", "exec", "torch.load", "torch.save", "np.load", "numpy.load", "yaml.load"}
BANNED_CALLS |= {"joblib.load", "joblib.dump"}
WORKERS = "p2pfl/sweep/execute.py"  # joblib starts our own worker processes; it loads no file
PURE = ("peer", "algorithms", "membership")
WORLD = {"time", "random.random", "os", "threading", "socket", "asyncio", "zmq", "subprocess"}


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.stem)
def test_nothing_unsafe_is_imported_or_called(path):
    banned = BANNED_MODULES - ({"joblib"} if path.as_posix().endswith(WORKERS) else set())
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names]
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            assert not banned & {name.split(".")[0] for name in names}
        if isinstance(node, ast.Call):
            assert ast.unparse(node.func) not in BANNED_CALLS


@pytest.mark.parametrize(
    "path", [p for p in SOURCES if p.parent.name in PURE], ids=lambda path: path.stem
)
def test_state_machines_and_algorithms_know_no_clock_socket_or_thread(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = node.module if isinstance(node, ast.ImportFrom) else None
            names = [module] if module else [alias.name for alias in node.names]
            assert not WORLD & {name.split(".")[0] for name in names}
