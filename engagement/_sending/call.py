"""One call of a transport, and the check that it may still begin."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import Context, ContextVar, Token
from typing import Any

Result = Callable[[], Any]
"""A call of the transport: returns its value, or raises its exception."""


class LeaseRanOut(BaseException):
    """The send was not begun: somebody else may have recovered the message.

    No `Exception`: a transport that falls back on another one when this one fails must not do so.
    """


class MayHaveLeft(BaseException):
    """The send was broken off after something that may have sent it."""


_call_of_this_send: ContextVar[Call | None] = ContextVar("engagement_call", default=None)


@contextmanager
def checked_lease() -> Iterator[None]:
    """Run the block only if the send around it may still begin; else raise `LeaseRanOut`, or `MayHaveLeft`.

    For a transport that did something else first (a policy that asked another server). Outside a worker's send nothing
    is checked.
    """
    call = _call_of_this_send.get()
    if call is None:
        yield
        return
    try:
        call.check()
    except LeaseRanOut:
        if call.may_have_left:
            raise MayHaveLeft("the lease ran out after something that may have sent it") from None
        raise
    try:
        yield
    except LeaseRanOut:
        raise
    except BaseException:
        call.may_have_left = True
        raise
    else:
        call.may_have_left = True


class Call:
    """One call of a function of the transport, in `context`.

    A class, as are its kinds, and not three closures: the garbage collector visits each function and each cell.
    See docs/decisions.md#2026-11-27--a-call-in-hand-is-our-own-object-and-threads-are-woken-one-by-one.
    """

    __slots__ = ("arguments", "context", "function", "may_have_left")

    def __init__(self, function: Callable[..., Any], *arguments: object, context: Context) -> None:
        self.function = function
        self.arguments = arguments
        self.context = context
        self.may_have_left = False

    def begin(self) -> Token[Call | None]:
        """Check, right before the call. `checked_lease` can check again until `end`."""
        self.check()
        return _call_of_this_send.set(self)

    def end(self, token: Token[Call | None]) -> None:
        """Let the context go: it leads back here, in a circle that would have to wait for the garbage collector."""
        _call_of_this_send.reset(token)

    def check(self) -> None:
        """Raise `LeaseRanOut` if the call may not begin any more."""

    def arrive(self, result: Result) -> None:
        """Take the result of the call, by calling `result`."""
        raise NotImplementedError
