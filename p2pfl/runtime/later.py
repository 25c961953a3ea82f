"""States that are worked out when they are wanted: what a peer has mixed can wait.

A peer only passes its state on, to be sent or trained. So its `receive` may do no more than
note what is to be mixed, and the sums are done right before the local steps, while what
they give is in the processor's cache.
"""

from __future__ import annotations

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

    __slots__ = ("_algorithm", "_inbox", "_state")

    def __init__(
        self,
        algorithm: Algorithm[Any, Any, Any],
        state: Any,  # noqa: ANN401 - whatever the algorithm keeps
        inbox: Inbox[Any] | None = None,
    ) -> None:
        self._algorithm, self._state, self._inbox = algorithm, state, inbox

    def worked_out(self, into: Tensor | None = None) -> Any:  # noqa: ANN401
        """Return the state, and keep nothing of it.

        Args:
            into: memory, ``[1, d]``, to which what is mixed first may be written.
        """
        if self._inbox is None:
            return self._state
        if into is not None and isinstance(self._inbox, Letters):
            self._inbox.into.append(into)
        return self._algorithm.receive(self._state, self._inbox)

    def now(self) -> Any:  # noqa: ANN401
        """Return the state, and keep it in place of what it was made of."""
        self._state, self._inbox = self.worked_out(), None
        return self._state

    @property
    def params(self) -> Tensor:
        """The model, ``[1, d]``."""
        return self._algorithm.model(self.now())


def postponed(algorithm: Algorithm[Any, Any, Any]) -> Algorithm[Any, Any, Any]:
    """Return an algorithm for one row at a time whose states, and models, are `Later`."""
    return algorithm._replace(
        init=lambda x, rows: Later(algorithm, algorithm.init(x, rows)),
        model=lambda state: cast(Tensor, state),  # the runtime asks it when it needs a model
        send=lambda state: algorithm.send(state.now()),
        receive=lambda state, inbox: Later(algorithm, state.now(), inbox),
    )
