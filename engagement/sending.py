"""The transport's side: runs its calls beside the worker, and puts each answer where the worker waits for it.

Plain functions run in threads, `async def` in one event loop; either hands back a future, and in one place a future's
result or exception becomes an outcome.
"""

from __future__ import annotations

import asyncio
import inspect
import threading
import time
from collections.abc import Callable, Coroutine, Iterable, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextvars import copy_context
from dataclasses import dataclass
from datetime import UTC, datetime
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol

from engagement import observing
from engagement.messages import OutgoingMessage
from engagement.outcomes import Classify, InDoubt, NotSent, Outcome, Postpone, Sent, as_outcome

SendFunction = Callable[[OutgoingMessage], Any]
"""`send(message)`: returns an outcome, or `None` or a provider's message id for `Sent`; may be `async def`."""


class SendingTransport(Protocol):
    """An object that sends. It may also have what `Transport` lists as optional."""

    def send(self, message: OutgoingMessage, /) -> Any:
        """Send, and return an outcome, or `None` or a provider's message id for `Sent`."""


class BatchTransport(Protocol):
    """An object whose provider takes many messages in one call."""

    def send_many(self, messages: Sequence[OutgoingMessage], /) -> Any:
        """Send all, and return an outcome for each, in their order."""


Transport = SendFunction | SendingTransport | BatchTransport
"""What sends: a function, or an object with `send` or `send_many`. Optional on the object, each also as `async def`:

- `ready() -> bool`: False while nothing can be sent; nothing is claimed then. Asked at most once a second.
- `idempotent: bool`: the same delivery id twice has one effect.
- `look_up(message) -> Sent | NotSent | None`: what became of this delivery id; None if that is not known.
"""


_Call = Callable[..., Future[Any]]
"""Runs a function of the transport where it belongs: takes what is to be checked right before, and its arguments."""

CLOSE_SECONDS = 5.0
"""How long the event loop may take to cancel what is left in it."""


def _boot_clock() -> float:
    return time.clock_gettime(time.CLOCK_BOOTTIME)


# Unlike the monotonic clock of Linux, this one goes on while the machine sleeps, as the database's does.
clock: Callable[[], float] = _boot_clock if hasattr(time, "CLOCK_BOOTTIME") else time.monotonic


Position = tuple[datetime, int]
"""A place in the queue: when a message is due, and its id."""


@dataclass(slots=True, eq=False)
class Claim:
    """A message in hand. `place` is where it stood in the queue, `held_until` when its lease runs out, by `clock`."""

    message: OutgoingMessage
    place: Position
    held_until: float
    worker_lost: bool = False
    """It was claimed by another worker, whose lease ran out: the question is what became of it."""
    trace_context: str | None = None
    """The W3C `traceparent` of the span that queued the message."""
    known: Outcome | None = None
    """The outcome, if it is known without the transport."""
    started_at: float = 0.0
    """When it was handed to a thread or the event loop."""
    begun_at: float | None = None
    """When its send really began, which may be later on a busy machine."""
    future: Future[Any] | None = None
    is_overdue: bool = False
    """It outlasted its time-out and was settled as in doubt; what comes now is late."""


class LeaseRanOut(Exception):  # noqa: N818 - what happened
    """The send was not begun: somebody else may have recovered the message."""


class Sender:
    """Runs the calls of one transport, at most `concurrency` at once.

    `answers` is where the outcomes arrive; None says only that `ready` has answered.
    """

    def __init__(self, transport: Transport, *, concurrency: int, classify: Classify) -> None:
        send_many: Any = getattr(transport, "send_many", None)
        send: Any = getattr(transport, "send", transport)
        if not callable(send_many or send):
            raise TypeError("transport: must be a function, or an object with send or send_many")
        self.answers: SimpleQueue[tuple[Claim, Outcome] | None] = SimpleQueue()
        self.idempotent = bool(getattr(transport, "idempotent", False))
        self.sends_many = send_many is not None
        self._classify = classify
        self._loop = _EventLoop()
        self._threads = _Threads(concurrency, self._loop)
        self._send = self._call(send_many or send)
        look_up, ready = getattr(transport, "look_up", None), getattr(transport, "ready", None)
        self._look_up = None if look_up is None else self._call(look_up)
        self._ready = None if ready is None else self._call(ready)

    def start(self, claims: list[Claim]) -> None:
        """Send what was claimed; ask what became of what was taken over."""
        now = clock()
        to_send = []
        for claim in claims:
            claim.started_at = now
            if claim.worker_lost and self._look_up is None and claim.known is None:
                claim.known = _worker_lost()
            if claim.known is not None:
                self.answers.put((claim, claim.known))
            elif claim.worker_lost and self._look_up is not None:
                self._submit([claim], self._look_up, claim.message, _read_look_up)
            elif self.sends_many:
                to_send.append(claim)
            else:
                self._submit([claim], self._send, claim.message, _read_send)
        if to_send:
            self._submit(to_send, self._send, [claim.message for claim in to_send], _read_send_many)

    def ask_ready(self) -> Future[Any] | None:
        """Ask the transport whether it can send now, or return None if it has no `ready` to ask."""
        if self._ready is None:
            return None
        answer = self._ready(_always)
        answer.add_done_callback(lambda _: self.answers.put(None))
        return answer

    def close(self) -> None:
        """Let idle threads end. One that hangs in a send is left behind; it does not keep the process alive."""
        self._threads.close()
        self._loop.close()

    def _submit(
        self,
        claims: list[Claim],
        call: _Call,
        argument: object,
        read: Callable[[Any, int], list[Outcome]],
    ) -> None:
        held_until = min(claim.held_until for claim in claims)

        def check() -> None:
            # The last thing before the send: a worker that was frozen since its claim must not send any more.
            now = clock()
            if now >= held_until:
                raise LeaseRanOut
            for claim in claims:
                claim.begun_at = now

        context = copy_context()
        tell = context.run(observing.sending, claims)

        def arrive(future: Future[Any]) -> None:
            outcomes = self._outcomes(future, len(claims), read)
            tell(outcomes)
            for claim, outcome in zip(claims, outcomes, strict=True):
                self.answers.put((claim, outcome))

        future = context.run(call, check, argument)
        for claim in claims:
            claim.future = future
        future.add_done_callback(arrive)

    def _call(self, function: Callable[..., Any]) -> _Call:
        submit = self._loop.submit if _is_async(function) else self._threads.submit
        return lambda check, *arguments: submit(check, function, *arguments)

    def _outcomes(self, future: Future[Any], messages: int, read: Callable[[Any, int], list[Outcome]]) -> list[Outcome]:
        """Return what the transport answered, or what its exception means, for each message of the call."""
        outcome: Outcome
        try:
            return read(future.result(), messages)
        except LeaseRanOut:
            outcome = Postpone(datetime.now(UTC), "the lease ran out before the send")
        except CancelledError:
            outcome = InDoubt("the send was cancelled")
        except Exception as error:  # noqa: BLE001 - the one place: whatever a transport raises becomes an outcome
            outcome = _worker_lost(error) if read is _read_look_up else self._checked_classify(error)
        except BaseException as error:  # noqa: BLE001 - likewise, and nothing is known of a send that was torn down
            outcome = InDoubt(f"{type(error).__name__} in the transport")
        return [outcome] * messages

    def _checked_classify(self, error: Exception) -> Outcome:
        try:
            outcome = self._classify(error)
        except Exception as second:  # noqa: BLE001 - a broken rule must not lose what happened
            return InDoubt(f"classify raised {type(second).__name__} for {type(error).__name__}")
        if isinstance(outcome, Outcome):
            return outcome
        return InDoubt(f"classify returned {type(outcome).__name__} for {type(error).__name__}")


def _read_send(answer: Any, _: int) -> list[Outcome]:
    return [as_outcome(answer)]


def _read_send_many(answers: Any, messages: int) -> list[Outcome]:
    if isinstance(answers, Outcome):
        return [answers] * messages
    # A text, or a mapping, has members too, and says nothing of any message.
    is_sequence = isinstance(answers, Iterable) and not isinstance(answers, str | bytes | Mapping)
    answers = list(answers) if is_sequence else []
    if len(answers) != messages:
        return [InDoubt(f"send_many returned {len(answers)} outcomes for {messages} messages")] * messages
    return [as_outcome(answer) for answer in answers]


def _read_look_up(answer: Any, _: int) -> list[Outcome]:
    return [answer if isinstance(answer, Sent | NotSent) else _worker_lost()]


def _worker_lost(error: Exception | None = None) -> InDoubt:
    besides = "" if error is None else f"; look_up raised {type(error).__name__}"
    return InDoubt(f"its worker was lost between claim and settle{besides}")


def _always() -> None:
    """Hold no lease that could run out."""


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


class _Threads:
    """Daemon threads, started as needed: unlike those of an executor, one that hangs keeps no process alive."""

    def __init__(self, limit: int, loop: _EventLoop) -> None:
        self._limit = limit
        self._loop = loop
        self._jobs: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._started = 0

    def submit(self, check: Callable[[], None], function: Callable[..., Any], *arguments: object) -> Future[Any]:
        future: Future[Any] = Future()

        def job() -> None:
            if not future.set_running_or_notify_cancel():
                return
            try:
                check()
                result = function(*arguments)
                if inspect.iscoroutine(result):  # A plain function that returns one, such as a lambda.
                    result = self._awaited(check, result)
                elif inspect.isgenerator(result):  # Its sends are made here, not where the answer is read.
                    result = list(result)
            except BaseException as error:  # noqa: BLE001 - the future hands it on
                future.set_exception(error)
            else:
                future.set_result(result)

        # In a copy of the caller's context, as the event loop runs an `async def`.
        self._jobs.put(partial(copy_context().run, job))
        if self._started < self._limit:
            threading.Thread(target=self._work, name=f"engagement-send-{self._started}", daemon=True).start()
            self._started += 1
        return future

    def close(self) -> None:
        for _ in range(self._started):
            self._jobs.put(None)

    def _awaited(self, check: Callable[[], None], coroutine: Coroutine[Any, Any, Any]) -> Any:
        try:
            return self._loop.submit(check, lambda: coroutine).result()
        finally:
            coroutine.close()  # If the check failed, it was never begun.

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None:
            job()


class _EventLoop:
    """One event loop in a thread of its own, started at the first `async def`."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_running = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._work, name="engagement-loop", daemon=True)

    def submit(self, check: Callable[[], None], function: Callable[..., Any], *arguments: object) -> Future[Any]:
        async def job() -> Any:
            check()
            return await function(*arguments)

        with self._lock:
            if self._loop is None:
                self._thread.start()
                self._is_running.wait()
        assert self._loop is not None
        return asyncio.run_coroutine_threadsafe(job(), self._loop)

    def close(self) -> None:
        if self._loop is not None:
            self._loop.call_soon_threadsafe(self._stop.set)
            self._thread.join(CLOSE_SECONDS)

    def _work(self) -> None:
        asyncio.run(self._main())  # which cancels what is left at its end

    async def _main(self) -> None:
        self._stop = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._is_running.set()
        await self._stop.wait()
