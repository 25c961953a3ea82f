from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack

import pytest
from links_cases import Stage


@pytest.fixture
def stage() -> Iterator[Callable[[int], Stage]]:
    """Makes so many peers with links, and closes them all in the end."""
    with ExitStack() as stack:
        yield lambda n: Stage(stack, n)
