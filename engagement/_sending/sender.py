"""Runs the calls of one transport beside the worker, and puts each answer where the worker waits for it."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from contextvars import Context, copy_context
from dataclasses import dataclass
from queue import SimpleQueue
from typing import Any

from engagement._claim import Claim, Handle, clock
from engagement._sending.answers import Read, outcomes, read_look_up, read_send, read_send_many, worker_lost
from engagement._sending.call import Call, LeaseRanOut, Result
from engagement._sending.event_loop import EventLoop
from engagement._sending.protocols import Transport
from engagement._sending.threads import Threads
from engagement._watching import observers as observing
from engagement.messages.checks import checked_flag
from engagement.models import EARLIEST
from engagement.outcomes import Classify, Outcome, Postpone

Answer = tuple[Claim, Outcome]
"""The outcome of a send or a look-up. A plain tuple is recycled, and so wakes the garbage collector less often."""


@dataclass(frozen=True, slots=True)
class Begun:
    """A send has begun, at `claim.begun_at`."""

    claim: Claim


@dataclass(frozen=True, slots=True)
class Ready:
    """The transport was asked whether it is ready; `said` is its answer, or its exception."""

    said: object


@dataclass(slots=True)
class Woken:
    """Something may be due that was not. One is told at a time."""

    is_told: bool = False


News = Answer | Begun | Ready | Woken


class Sender:
    """Runs the calls of one transport, at most `concurrency` at once; `news` is where a worker hears of them.

    `Begun` is told if `tells_begun`.
    """

    def __init__(
        self, transport: Transport, *, concurrency: int, classify: Classify, tells_begun: bool = False
    ) -> None:
        send_many: Any = getattr(transport, "send_many", None)
        send: Any = getattr(transport, "send", transport)
        if not callable(send_many or send):
            raise TypeError("transport: must be a function, or an object with send or send_many")
        self.news: SimpleQueue[News] = SimpleQueue()
        self.tells_begun = tells_begun
        self.idempotent = checked_flag("idempotent", getattr(transport, "idempotent", False))
        self.sends_many = send_many is not None
        self.classify = classify
        self._loop = EventLoop()
        self._threads = Threads(concurrency, self._loop)
        self._send = self._placed(send_many or send)
        look_up, ready = getattr(transport, "look_up", None), getattr(transport, "ready", None)
        self._look_up = None if look_up is None else self._placed(look_up)
        self._ready = None if ready is None else self._placed(ready)
        self.can_be_asked = ready is not None

    def start(self, claims: list[Claim]) -> None:
        """Send the messages that were claimed; look up those that were taken over."""
        now = clock()
        to_send = []
        for claim in claims:
            claim.started_at = now
            if claim.lost_workers and self._look_up is None and claim.known is None:
                claim.known = worker_lost()
            if claim.known is not None:
                self.news.put((claim, claim.known))
            elif claim.lost_workers and self._look_up is not None:
                self._submit([claim], self._look_up, claim.message, read_look_up)
            elif self.sends_many:
                to_send.append(claim)
            else:
                self._submit([claim], self._send, claim.message, read_send)
        if to_send:
            self._submit(to_send, self._send, [claim.message for claim in to_send], read_send_many)

    def ask_ready(self) -> None:
        """Ask the transport whether it can send now; `Ready` brings its answer."""
        assert self._ready is not None
        self._ready.submit(_Asking(self._ready, context=copy_context(), news=self.news))

    def close(self) -> None:
        """Let idle threads end. One that hangs in a send is left behind; it does not keep the process alive."""
        self._threads.close()
        self._loop.close()

    def _submit(self, claims: list[Claim], to: _Placed, argument: object, read: Read) -> None:
        try:
            handle = to.submit(_Sending(to, argument, self, claims, read))
        except (OSError, RuntimeError) as error:  # The system has no thread left, or no event loop.
            outcome = worker_lost(error) if read is read_look_up else Postpone(EARLIEST, "no thread could be started")
            for claim in claims:
                self.news.put((claim, outcome))
            return
        for claim in claims:
            claim.handle = handle

    def _placed(self, function: Callable[..., Any]) -> _Placed:
        return _Placed(function, self._loop.submit if _is_async(function) else self._threads.submit)


@dataclass(frozen=True, slots=True)
class _Placed:
    """A function of the transport, and the threads or the event loop that run it."""

    function: Callable[..., Any]
    submit: Callable[[Call], Handle]


class _Sending(Call):
    """A send, or a look-up."""

    __slots__ = ("_claims", "_read", "_sender", "_tell")

    def __init__(self, to: _Placed, argument: object, sender: Sender, claims: list[Claim], read: Read) -> None:
        context, self._tell = observing.sending(claims)
        super().__init__(to.function, argument, context=context)
        self._sender = sender
        self._claims = claims
        self._read = read

    def check(self) -> None:
        # The last thing before the send: a worker that was frozen since its claim must not send any more. A look-up
        # sends nothing, and without it nobody knows whether its message was sent.
        now = clock()
        is_send = self._read is not read_look_up
        for claim in self._claims:
            if claim.is_overdue or (is_send and now >= claim.held_until):
                raise LeaseRanOut
        for claim in self._claims:
            claim.begun_at = now
            if is_send and self._sender.tells_begun:
                self._sender.news.put(Begun(claim))

    def arrive(self, result: Result) -> None:
        sender = self._sender
        answered = outcomes(result, len(self._claims), self._read, sender.classify)
        try:
            self._tell(answered)
        finally:
            # They lead back here, and a circle would have to wait for the garbage collector.
            claims, self._claims = self._claims, []
            for claim, outcome in zip(claims, answered, strict=True):
                sender.news.put((claim, outcome))


class _Asking(Call):
    """A question whether the transport is ready."""

    __slots__ = ("_news",)

    def __init__(self, to: _Placed, *, context: Context, news: SimpleQueue[News]) -> None:
        super().__init__(to.function, context=context)
        self._news = news

    def arrive(self, result: Result) -> None:
        try:
            said = result()
        except BaseException as error:  # noqa: BLE001 - an exception is a no
            said = error
        self._news.put(Ready(said))


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004
