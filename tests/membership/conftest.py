from __future__ import annotations

import pytest


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--swarm-seed", type=int, help="run this seed of the swarm only")
    parser.addoption(
        "--rewrite-membership",
        action="store_true",
        help="write what peers do now into tests/membership/golden",
    )
