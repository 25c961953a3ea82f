"""What torch.distributed says where another rank has gone, as an error of ours."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch.distributed as dist

from p2pfl.errors import RunError


@contextmanager
def exchanging() -> Iterator[None]:
    """Exchange something with the other ranks.

    Raises:
        RunError: one of them has gone, or has not answered for too long.
    """
    try:
        yield
    except RuntimeError as error:
        # Gloo's errors have no type of their own: they are known by the file that they name.
        if not isinstance(error, dist.DistError) and "gloo/" not in str(error):
            raise
        text = re.sub(r"^\[[^]]*\] *", "", str(error))  # that file
        reason = text.partition("\n")[0].partition(". ")[0]  # what follows is advice
        raise RunError(f"another rank has gone: {reason}") from error
