"""The terminal somebody sits at: Ctrl-C at any moment, and one that was closed."""

from __future__ import annotations

import errno
import signal
import threading
from collections import namedtuple
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Handler = signal.Handlers | Callable[..., object]


def end_at_once() -> None:
    """Let Ctrl-C end this process at once, as long as there is nothing to tidy up.

    Python would raise an exception instead. While torch is imported, C code drops some of these,
    and we would go on as if nobody had pressed anything.
    """
    _exchange(signal.default_int_handler, signal.SIG_DFL)


def tidy_up_first() -> None:
    """Let Ctrl-C raise KeyboardInterrupt again: all is imported, and something is to begin."""
    _exchange(signal.SIG_DFL, signal.default_int_handler)


def dealt_with() -> None:
    """Have an interrupt that was caught be over, so that this process ends with the code we say.

    CPython remembers one that has left code which was compiled from a text, as that of every
    dataclass is, and ``python -m`` then ends by SIGINT whatever we exit with. The next such code
    makes it forget: that of a named tuple will do.
    """
    namedtuple("Over", ())


def requests() -> list[signal.Signals]:
    """Return the signals that ask us to end: SIGTERM, and SIGHUP from a terminal that is closed.

    Where SIGHUP is ignored, as by ``nohup``, it asks nothing.
    """
    ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    return [signal.SIGTERM] if ignored else [signal.SIGTERM, signal.SIGHUP]


def heed_requests() -> None:
    """Let the first request to end do what Ctrl-C does; both a shell and the kernel send SIGHUP."""
    asking = requests()

    def interrupt(number: int, frame: object) -> None:
        for another in asking:
            signal.signal(another, signal.SIG_IGN)
        raise KeyboardInterrupt

    for number in asking:
        signal.signal(number, interrupt)


@contextmanager
def perhaps_closed() -> Iterator[None]:
    """Print to a terminal that may have been closed, which is no reason to fail."""
    try:
        yield
    except OSError as error:
        if error.errno != errno.EIO:
            raise


def _exchange(old: object, new: Handler) -> None:
    """Handle SIGINT in another way, unless it is ignored, or the caller's own."""
    main = threading.current_thread() is threading.main_thread()  # no other thread may
    if main and signal.getsignal(signal.SIGINT) is old:
        signal.signal(signal.SIGINT, new)
