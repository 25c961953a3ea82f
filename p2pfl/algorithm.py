"""What an algorithm is: pure functions over blocks of rows.

A block stacks one quantity of several nodes along its first axis: parameters are
``[rows, d]``, a scalar is ``[rows, 1]``. The simulator holds one block with a row per
node; a peer process holds a block with a single row. An algorithm is written for blocks
and never learns which of the two it is running in.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Generic, Literal, NamedTuple, TypeVar, cast

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

S = TypeVar("S", bound=tuple[Any, ...])  # state of the rows: a NamedTuple of blocks
M = TypeVar("M", bound=tuple[Tensor, ...])  # message: a flat NamedTuple of blocks
R = TypeVar("R", bound=tuple[Tensor, ...])  # what is remembered of each sender


class Rows(NamedTuple):
    """Who the rows of a block are.

    Their neighbours are told to algorithms which need them to stay and send each something else.
    """

    nodes: Tensor  # [rows], int64: the id of the node behind each row
    examples: Tensor  # [rows], int64: how many training examples that node holds
    # [rows, k], int64, ascending, -1 where there are no more; k is the same for all nodes
    neighbours: Tensor | None = None


@dataclass(frozen=True, slots=True)
class Inbox(Generic[R]):
    """What the rows of a block have heard, and how much each row makes of it.

    In the simulator the senders are all nodes and `weights` is the mixing matrix, dense
    or sparse (CSR); where all rows are equal it is one row, expanded. In a peer the senders
    are the peer itself and the neighbours it has heard, in the order of their ids, and
    `weights` is one line of that matrix. A wide field of what was heard may be a tuple of
    rows there: it is for the methods of the inbox alone.

    Who has a weight of 0 was not heard. Only oneself always is: some rules keep nothing of it.
    """

    weights: Tensor  # [rows, senders]
    heard: R  # fields [senders, ...]
    own: Tensor  # [rows]: where each row stands among the senders

    def mix(self, field: Tensor, by: Tensor | None = None) -> Tensor:
        """Return the weighted sum over senders, ``[senders, d] -> [rows, d]``.

        With `by` (``[senders, 1]``, non-negative) the weights are first scaled by it and
        normalised, so that every row takes a convex combination.
        """
        # Weights in half precision do not sum to one.
        wide = torch.promote_types(field.dtype, torch.float32)
        weights = self.weights.to(wide)
        if by is not None:
            weights = _scaled(weights, by.to(wide))
        return _weighted_sum(weights, field.to(wide)).to(field.dtype)

    def mean(self, field: Tensor, by: Tensor) -> Tensor:
        """Return the mean over the senders a row has heard, in proportion to `by`.

        The mixing weights only say who was heard. ``[senders, d], [senders, 1] -> [rows, d]``
        """
        return Inbox(self._ones(), self.heard, self.own).mix(field, by)

    def largest(self, field: Tensor) -> Tensor:
        """Return the largest value among the senders heard, ``[senders, 1] -> [rows, 1]``."""
        block, mask = self.gather(field)
        return block.masked_fill(~mask.unsqueeze(-1), -torch.inf).amax(1)

    def mine(self, field: Tensor) -> Tensor:
        """Return what the others know of the rows themselves."""
        return field[self.own]

    def gather(self, field: Tensor) -> tuple[Tensor, Tensor]:
        """Return every row's senders side by side, padded, with their mask.

        ``[senders, d] -> [rows, k, d], [rows, k]`` where k is the largest number of senders
        of any row: k times the memory of `mix`, for aggregations which are not linear.
        """
        place, mask = self.places()
        return field[place], mask

    def shares(self) -> Tensor:
        """Return the weights of every row's senders, laid out as by `gather`, ``[rows, k]``."""
        if self.weights.layout is torch.sparse_csr:
            at, mask = self._slots()
            return self.weights.values()[at] * mask
        place, mask = self.places()
        return self.weights.gather(1, place) * mask

    def places(self) -> tuple[Tensor, Tensor]:
        """Return where every row's senders stand, and their mask, both ``[rows, k]``."""
        if self.weights.layout is torch.sparse_csr:
            at, mask = self._slots()
            return self.weights.col_indices()[at], mask
        mask, order = self._is_heard().sort(dim=1, descending=True, stable=True)
        k = int(mask.sum(1).max())
        return order[:, :k], mask[:, :k]

    def others(self) -> Tensor:
        """Return which senders, as laid out by `gather`, are not the row itself, ``[rows, k]``."""
        place, mask = self.places()
        return mask & (place != self.own.unsqueeze(1))

    def _slots(self) -> tuple[Tensor, Tensor]:
        """Return where the entries of each row of sparse weights lie, ``[rows, k]``; and which."""
        start = self.weights.crow_indices()
        count = start.diff()
        slots = torch.arange(int(count.max()), device=start.device)
        at = (start[:-1, None] + slots).clamp(max=int(start[-1]) - 1)
        return at, (slots < count[:, None]) & self._is_heard()[at]

    def _is_heard(self) -> Tensor:
        """Return which weights are those of senders a row has heard: of sparse ones the values."""
        if self.weights.layout is torch.sparse_csr:
            own = self.own.repeat_interleave(self.weights.crow_indices().diff())
            return (self.weights.values() != 0) | (self.weights.col_indices() == own)
        return (self.weights != 0).scatter(1, self.own.unsqueeze(1), value=True)

    def _ones(self) -> Tensor:
        """Return weights of 1 for all that were heard."""
        if _is_one_row(self.weights):  # of equal weights none is 0
            return torch.ones_like(self.weights[:1]).expand_as(self.weights)
        ones = self._is_heard().to(self.weights.dtype)
        return _csr_like(self.weights, ones) if ones.ndim == 1 else ones


def _scaled(weights: Tensor, by: Tensor) -> Tensor:
    """Return weights times `by`, ``[senders, 1]``, whose rows sum to one again."""
    if weights.layout is torch.sparse_csr:
        weights = _csr_like(weights, weights.values() * by[weights.col_indices(), 0])
        total = _weighted_sum(weights, torch.ones_like(by))
        each = total[:, 0].repeat_interleave(weights.crow_indices().diff())
        return _csr_like(weights, weights.values() / each)
    if _is_one_row(weights):
        row = weights[:1] * by.T
        return (row / row.sum()).expand_as(weights)
    weights = weights * by.T
    return weights / weights.sum(1, keepdim=True)


def _weighted_sum(weights: Tensor, field: Tensor) -> Tensor:
    """Return ``weights @ field``, which a product of sparse matrices does at half the speed."""
    if weights.layout is torch.sparse_csr:
        return embedding_bag(
            weights.col_indices(),
            field,
            weights.crow_indices(),
            mode="sum",
            per_sample_weights=weights.values(),
            include_last_offset=True,
        )
    if _is_one_row(weights):
        return (weights[:1] @ field).expand(len(weights), -1)
    return weights @ field


def _is_one_row(weights: Tensor) -> bool:
    return len(weights) > 1 and weights.layout is torch.strided and weights.stride(0) == 0


def _csr_like(weights: Tensor, values: Tensor) -> Tensor:
    return torch.sparse_csr_tensor(
        weights.crow_indices(),
        weights.col_indices(),
        values,
        weights.shape,
        check_invariants=False,  # they hold, as in the matrix it was made of
    )


def newest(known: R | None, message: M, d: int) -> R:
    """Remember only the latest message of a sender."""
    return cast(R, message)


class Needs(NamedTuple):
    """What an algorithm asks of the network it runs on; a wrong pairing is refused.

    Attributes:
        weights: ``"mean"`` wants rows that sum to one, ``"mass"`` columns, ``"none"`` hears
            nobody.
        graph: ``"symmetric"`` wants every link to go both ways, ``"complete"`` wants
            everybody to hear everybody, ``"tree"`` wants one way from anybody to anybody, there
            and back.
        static: the graph must not change from round to round.
        every_message: a message that is lost, or taken a round late, breaks the method.
        positive: the mixing matrix must have no eigenvalue at or below -1/3.
        one_step: a round is exactly one local step.
        rounds: an exchange ends a round of local steps; on a timer there are none.
        convex: no mixing weight may be negative.
        models: a row that is given fewer models in a round, its own included, keeps its own.
        rule: what lays the models it hears side by side, in words; "": nothing does.
        single: a row hears one other at a time; on a timer it trains after each.
        addressed: neighbours are sent different messages. The fields of a message are then
            ``[rows, K, ...]``: of those a row sends to in a round, in ascending order of their
            ids, the t-th is given variant ``t % K``, and nobody but the row itself hears of the
            others. What it has said itself, in its own inbox, is variant 0.
        counts: fields of a message that count something, or are shares of what does. Others are
            divided by them: from somebody else they are 0 to 2^53, or the message is refused.
    """

    weights: Literal["mean", "mass", "none"] = "mean"
    graph: Literal["any", "symmetric", "complete", "tree"] = "any"
    static: bool = False
    every_message: bool = False
    positive: bool = False
    one_step: bool = False
    rounds: bool = False
    convex: bool = False
    models: int = 1
    rule: str = ""
    single: bool = False
    addressed: bool = False
    counts: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class ByColumn(Generic[S]):
    """A `step` which treats every parameter by itself: it may be given a few columns at a time.

    What has no column for each parameter it makes the same of in all of them.
    """

    step: Callable[[S, Tensor], S]

    def __call__(self, state: S, grads: Tensor) -> S:
        """Make the step."""
        return self.step(state, grads)


def by_column(step: Callable[[S, Tensor], S], columnwise: bool) -> Callable[[S, Tensor], S]:
    """Return a step, `ByColumn` if what it calls treats every parameter by itself as well."""
    return ByColumn(step) if columnwise else step


class Algorithm(NamedTuple, Generic[S, M, R]):
    """Five pure functions, how a message is remembered, and what the network must be like.

    `factor` and `columnwise` only make things faster; they and what follows may be left out.

    Attributes:
        init: initial state from initial parameters ``[rows, d]``, given who the rows are.
        model: where the gradient is taken, and what is evaluated and saved.
        step: one local step, given the gradient at `model`; in less memory if it is `ByColumn`.
        send: what the neighbours are told.
        receive: what is made of their messages.
        absorb: what is remembered of a sender after its next message, given the number of
            parameters d; raises `ValueError` for a message no honest peer sends.
        needs: what is asked of the network.
        factor: where a local step adds a multiple of the gradient to the model, and the
            model is a field of the state: that multiple, ``[rows, 1]``, and the state after
            the step but for the model. Steps may then go straight into the parameters.
        columnwise: whether `receive` treats every parameter by itself, so that it may be
            given a few columns at a time.
        carry: what local steps have made of a state while it was exchanged: given the state
            that was sent, the same after the steps, and the same after the exchange, the one
            that has had both. None: the method does not allow it.
        restart: for methods whose messages build on earlier ones: the state as if nothing had
            been said to anybody, because somebody is to hear it who has not heard what was. None:
            there is no need, or no way.
        settle: what is made of a state after the local steps of a round. None: nothing.
        keeps_mean: whether the models have the same mean after an exchange as before, if the
            mixing matrix leaves that of any numbers as it is.

    Functions return new tensors and never write into those they were given (the optimiser's
    state apart): a message may still be on its way out while the next local steps run.
    """

    init: Callable[[Tensor, Rows], S]
    model: Callable[[S], Tensor]
    step: Callable[[S, Tensor], S]
    send: Callable[[S], M]
    receive: Callable[[S, Inbox[R]], S]
    absorb: Callable[[R | None, M, int], R] = newest
    needs: Needs = Needs()
    factor: Callable[[S], tuple[Tensor, S]] | None = None
    columnwise: bool = False
    carry: Callable[[S, S, S], S] | None = None
    restart: Callable[[S], S] | None = None
    settle: Callable[[S], S] | None = None
    keeps_mean: bool = False


def on_inner(change: Callable[..., Any] | None) -> Callable[..., Any] | None:
    """Let what makes a state of others act on states which hold one as field `inner`.

    What else they hold stays as it is in the last one. None stays None.
    """
    if change is None:
        return None
    return lambda *states: states[-1]._replace(inner=change(*(s.inner for s in states)))
