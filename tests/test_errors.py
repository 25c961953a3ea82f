"""Errors that come from elsewhere, in one line."""

import pytest
import torch

from p2pfl import cli
from p2pfl.errors import RunError, short_of_memory

FULL = (
    "[enforce fail at alloc_cpu.cpp:127] err == 0. DefaultCPUAllocator: can't allocate memory: "
    "you tried to allocate 80000000000000 bytes. Error code 12 (Cannot allocate memory)\n"
    "frame #0: c10::ThrowEnforceNotMet"
)


@pytest.mark.parametrize(
    ("error", "told"),
    [
        (MemoryError(), "out of memory"),
        (MemoryError("Unable to allocate 8 TiB"), "out of memory: Unable to allocate 8 TiB"),
        (RuntimeError(FULL), "out of memory: you tried to allocate 80000000000000 bytes"),
        (torch.OutOfMemoryError("CUDA out of memory. Tried"), "out of memory: CUDA out of memory."),
    ],
)
def test_that_memory_has_run_out_is_told_in_one_line(error, told, monkeypatch, capsys):
    def fail():
        raise error

    with pytest.raises(RunError, match=f"^{told}") as caught, short_of_memory():
        fail()
    assert "\n" not in str(caught.value)
    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit, match="1"):
        cli.main()
    assert capsys.readouterr().err == f"p2pfl: {caught.value}\n"


def test_other_errors_stay_what_they_are():
    with pytest.raises(RuntimeError, match="shapes"), short_of_memory():
        raise RuntimeError("shapes do not match")
