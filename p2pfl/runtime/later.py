"""States that are worked out when they are wanted: what a peer has mixed can wait.

A peer only passes its state on, to be sent or trained. So its `receive` may do no more than
note what is to be mixed, and the sums are done right before the local steps, while what
they give is in the processor's cache.
"""

from __future__ import annotations

from threading import Lock
from typing import Any, cast

from torch import Tensor

from p2pfl.algorithm import Algorithm, Inbox
from p2pfl.peer.letters import Letters


class Later:
    """The state of one row after an exchange, if there was one.

    Args:
        algorithm: whose state it is.
        state: before the exchange.
        inbox: what was heard in it; None: there was none, and `state` it is.
    """

    __slots__ = ("_algorithm", "_lock", "_made_of")

    def __init__(
        self,
        algorithm: Algorithm[Any, Any, Any],
        state: Any,  # noqa: ANN401 - whatever the algorithm keeps
        inbox: Inbox[Any] | None = None,
    ) -> None:
        self._algorithm = algorithm
        self._made_of = state, inbox
        self._lock = Lock()  # what one thread works out, another need not

    def worked_out(self, into: Tensor | None = None) -> Any:  # noqa: ANN401
        """Return the state, and keep nothing of it.

        Args:
            into: memory, ``[1, d]``, to which what is mixed first may be written.
        """
        state, inbox = self._made_of
        if inbox is None:
            return state
        if into is not None and isinstance(inbox, Letters):
            inbox.into.append(into)
        return self._algorithm.receive(state, inbox)

    def now(self) -> Any:  # noqa: ANN401
        """Return the state, and keep it in place of what it was made of."""
        with self._lock:
            state = self.worked_out()
            self._made_of = state, None
        return state

    @property
    def params(self) -> Tensor:
        """The model, ``[1, d]``."""
        return self._algorithm.model(self.now())


def later(params: Tensor) -> Later:
    """Return what a peer takes for its model, which is a state in truth: see `postponed`."""
    return cast(Later, params)


def postponed(algorithm: Algorithm[Any, Any, Any]) -> Algorithm[Any, Any, Any]:
    """Return an algorithm for one row at a time whose states, and models, are `Later`."""
    carry, restart = algorithm.carry, algorithm.restart

    def carried(before: Later, trained: Later, mixed: Later) -> Later:
        assert carry is not None
        return Later(algorithm, carry(before.now(), trained.now(), mixed.now()))

    def restarted(state: Later) -> Later:
        assert restart is not None
        return Later(algorithm, restart(state.now()))

    return algorithm._replace(
        init=lambda x, rows: Later(algorithm, algorithm.init(x, rows)),
        model=lambda state: cast(Tensor, state),  # to the runtime it is `later` again
        send=lambda state: algorithm.send(state.now()),
        receive=lambda state, inbox: Later(algorithm, state.now(), inbox),
        carry=carried if carry else None,  # what comes of it is sent at once
        restart=restarted if restart else None,
    )
