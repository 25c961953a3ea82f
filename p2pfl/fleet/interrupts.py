"""What becomes of a launch when Ctrl-C is pressed, or the terminal is closed."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

from p2pfl.fleet.collect import gather
from p2pfl.fleet.watch import View

T = TypeVar("T")


@contextmanager
def completing(folder: Path) -> Iterator[None]:
    """Complete a run folder if this fails, whatever the cause: nothing has started yet."""
    try:
        yield
    except (asyncio.CancelledError, KeyboardInterrupt):  # a second Ctrl-C
        gather(folder, {}, "interrupted", None)
        raise
    except BaseException as error:
        gather(folder, {}, "failed", str(error) or type(error).__name__)
        raise


@contextmanager
def pointing_to_down(folder: Path, view: View) -> Iterator[None]:
    """Say how a launch that is left in the middle can still be ended and collected."""
    try:
        yield
    except (asyncio.CancelledError, KeyboardInterrupt):  # a second Ctrl-C
        view.note(f"p2pfl down {folder}  ends the peers and collects what they have left")
        raise


async def unless_interrupted(work: Coroutine[Any, Any, T], detach: asyncio.Event) -> T | None:
    """Return None if SIGINT or SIGTERM has ended it."""
    task = asyncio.create_task(work)
    with heeding_signals(task.cancel, detach):
        await asyncio.wait((task,))
    return None if task.cancelled() else task.result()


@contextmanager
def heeding_signals(interrupt: Callable[[], object], detach: asyncio.Event) -> Iterator[None]:
    """Let SIGINT and SIGTERM interrupt, and SIGHUP, a terminal that was closed, detach.

    Where SIGHUP is ignored, as by ``nohup``, it stays so.
    """
    loop = asyncio.get_running_loop()
    politely = (signal.SIGINT, signal.SIGTERM)

    def once() -> None:
        for number in politely:  # a second one ends us at once
            loop.remove_signal_handler(number)
        interrupt()

    for number in politely:
        loop.add_signal_handler(number, once)
    heeded = [*politely]
    if signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN:
        loop.add_signal_handler(signal.SIGHUP, detach.set)
        heeded.append(signal.SIGHUP)
    try:
        yield
    finally:
        for number in heeded:
            loop.remove_signal_handler(number)
