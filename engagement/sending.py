"""The transport's side: runs its calls beside the worker, and puts each answer where the worker waits for it.

Plain functions run in threads, `async def` in one event loop, and in one place what either returned or raised becomes
an outcome.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Coroutine, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import CancelledError, Future
from contextlib import contextmanager, suppress
from contextvars import Context, ContextVar, Token, copy_context
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from queue import SimpleQueue
from typing import Any, Protocol

from engagement import observing
from engagement.messages import OutgoingMessage, checked_flag
from engagement.models import EARLIEST
from engagement.outcomes import Classify, InDoubt, NotSent, Outcome, Postpone, Sent, as_outcome

logger = logging.getLogger("engagement")

SendFunction = Callable[[OutgoingMessage], Any]
"""`send(message)`: returns an outcome, or `None` or a provider's message id for `Sent`; may be `async def`."""


class SendingTransport(Protocol):
    """An object that sends. It may also have what `Transport` lists as optional."""

    def send(self, message: OutgoingMessage, /) -> Any:
        """Send, and return an outcome, or `None` or a provider's message id for `Sent`."""


class BatchTransport(Protocol):
    """An object whose provider takes many messages in one call."""

    def send_many(self, messages: Sequence[OutgoingMessage], /) -> Any:
        """Send all, and return an outcome for each, in their order, or one for all.

        An exception speaks of all; but a generator's only of those that it had not come to.
        """


Transport = SendFunction | SendingTransport | BatchTransport
"""What sends: a function, or an object with `send` or `send_many`. Optional on the object, each also as `async def`:

- `ready() -> bool`: False while nothing can be sent; nothing is claimed then. Asked at most once a second.
- `why_not_ready: str | None`: what it waits for, read after such a no. It is logged and shown: nothing personal.
- `idempotent: bool`: the same delivery id twice has one effect.
- `look_up(message) -> Sent | NotSent | None`: what became of this delivery id; None if that is not known. `NotSent`
  only if the far side takes nothing any more under this id: what is not found may come from a worker that is frozen.
"""


class Handle(Protocol):
    """What is kept of a call that was handed over."""

    def cancel(self) -> bool:
        """Take the call back; False if it goes on, though it may have been asked to end."""

    def done(self) -> bool:
        """Return whether it is over, and its place free."""


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
    """A message in hand.

    `place` is where it stood in the queue, `claimed_by` the name on its lease, and `held_until` when that
    runs out, by `clock`.
    """

    message: OutgoingMessage
    place: Position
    claimed_by: str
    held_until: float
    lost_workers: int = 0
    """How many workers were lost with it, before this one took it over: then the question is what became of it."""
    trace_context: str | None = None
    """The W3C `traceparent` of the span that queued the message."""
    known: Outcome | None = None
    """The outcome, if it is known without the transport."""
    started_at: float = 0.0
    """When it was handed to a thread or the event loop."""
    begun_at: float | None = None
    """When its send really began, which may be later on a busy machine."""
    handle: Handle | None = None
    is_overdue: bool = False
    """It outlasted its time-out and was settled as in doubt; what comes now is late."""


_Result = Callable[[], Any]
"""Returns what a call of the transport returned, or raises what it raised."""

_Read = Callable[[Any, int], list[Outcome]]
"""Turns what was returned into an outcome for each of so many messages."""


class LeaseRanOut(BaseException):
    """The send was not begun: somebody else may have recovered the message.

    No `Exception`: a transport that falls back on another one when this one fails must not do so.
    """


class BrokenOff(Exception):  # noqa: N818 - what happened
    """A batch raised `error` after it had said what became of the first messages."""

    def __init__(self, told: list[Outcome], error: BaseException) -> None:
        super().__init__()
        self.told = told
        self.error = error


class MayHaveLeft(BaseException):
    """The send was broken off after something that may have sent it."""


_call_of_this_send: ContextVar[_Call | None] = ContextVar("engagement_call", default=None)


@contextmanager
def checked_lease() -> Iterator[None]:
    """Do what is inside only if the send that this runs in may still begin; else raise what says so.

    For what did something else first, which may have taken its time. Outside a worker's send nothing is checked.
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
        self.idempotent = checked_flag("idempotent", getattr(transport, "idempotent", False))
        self.sends_many = send_many is not None
        self._classify = classify
        self._loop = _EventLoop()
        self._threads = _Threads(concurrency, self._loop)
        self._send = self._placed(send_many or send)
        look_up, ready = getattr(transport, "look_up", None), getattr(transport, "ready", None)
        self._look_up = None if look_up is None else self._placed(look_up)
        self._ready = None if ready is None else self._placed(ready)

    def start(self, claims: list[Claim]) -> None:
        """Send what was claimed; ask what became of what was taken over."""
        now = clock()
        to_send = []
        for claim in claims:
            claim.started_at = now
            if claim.lost_workers and self._look_up is None and claim.known is None:
                claim.known = _worker_lost()
            if claim.known is not None:
                self.answers.put((claim, claim.known))
            elif claim.lost_workers and self._look_up is not None:
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
        asking = _Asking(self._ready, self.answers)
        self._ready.submit(asking)
        return asking.answer

    def close(self) -> None:
        """Let idle threads end. One that hangs in a send is left behind; it does not keep the process alive."""
        self._threads.close()
        self._loop.close()

    def _submit(self, claims: list[Claim], to: _Placed, argument: object, read: _Read) -> None:
        handle = to.submit(_Sending(to, argument, self, claims, read))
        for claim in claims:
            claim.handle = handle

    def _placed(self, function: Callable[..., Any]) -> _Placed:
        return _Placed(function, self._loop.submit if _is_async(function) else self._threads.submit)

    def outcomes(self, result: _Result, messages: int, read: _Read) -> list[Outcome]:
        """Return what the transport answered, or what its exception means, for each message of the call."""
        try:
            return read(result(), messages)
        except BrokenOff as broken:
            told, outcome = broken.told, self._meaning(broken.error, read)
        except BaseException as error:  # noqa: BLE001 - the one place: whatever a transport raises becomes an outcome
            told, outcome = [], self._meaning(error, read)
        return told + [outcome] * (messages - len(told))

    def _meaning(self, error: BaseException, read: _Read) -> Outcome:
        if read is _read_look_up:
            return _worker_lost(error)  # Whatever it is, it says nothing of the send.
        if isinstance(error, LeaseRanOut):
            return Postpone(EARLIEST, "the lease ran out before the send")  # Until now, by the database's clock.
        if isinstance(error, MayHaveLeft):
            return InDoubt(str(error))
        if isinstance(error, CancelledError) or not isinstance(error, Exception):
            return InDoubt(f"{type(error).__name__} in the transport")  # It was torn down, which proves nothing.
        return self._checked_classify(error)

    def _checked_classify(self, error: Exception) -> Outcome:
        try:
            outcome = self._classify(error)
        except BaseException as second:  # noqa: BLE001 - a broken rule must not lose what happened
            return InDoubt(f"classify raised {type(second).__name__} for {type(error).__name__}")
        if isinstance(outcome, Outcome):
            return outcome
        return InDoubt(f"classify returned {type(outcome).__name__} for {type(error).__name__}")


@dataclass(frozen=True, slots=True)
class _Placed:
    """A function of the transport, and what runs it where it belongs."""

    function: Callable[..., Any]
    submit: Callable[[_Call], Handle]


class _Call:
    """One call of a function of the transport, in `context`.

    A class, as are those below, and not three closures: the garbage collector visits each function and each cell.
    """

    __slots__ = ("arguments", "context", "function", "may_have_left")

    def __init__(self, to: _Placed, *arguments: object, context: Context) -> None:
        self.function = to.function
        self.arguments = arguments
        self.context = context
        self.may_have_left = False

    def begin(self) -> Token[_Call | None]:
        """Check, right before the call, and let what is called check again until `end`."""
        self.check()
        return _call_of_this_send.set(self)

    def end(self, token: Token[_Call | None]) -> None:
        """Let the context go: it leads back here, in a circle that would have to wait for the garbage collector."""
        _call_of_this_send.reset(token)

    def check(self) -> None:
        """Raise what forbids the call."""

    def arrive(self, result: _Result) -> None:
        """Take what `result()` returns or raises."""
        raise NotImplementedError


class _Sending(_Call):
    """A send, or a look-up."""

    __slots__ = ("_claims", "_read", "_sender", "_tell")

    def __init__(self, to: _Placed, argument: object, sender: Sender, claims: list[Claim], read: _Read) -> None:
        context, self._tell = observing.sending(claims)
        super().__init__(to, argument, context=context)
        self._sender = sender
        self._claims = claims
        self._read = read

    def check(self) -> None:
        # The last thing before the send: a worker that was frozen since its claim must not send any more. A look-up
        # sends nothing, and without it nobody knows whether its message was sent.
        now = clock()
        is_send = self._read is not _read_look_up
        for claim in self._claims:
            if claim.is_overdue or (is_send and now >= claim.held_until):
                raise LeaseRanOut
        for claim in self._claims:
            claim.begun_at = now

    def arrive(self, result: _Result) -> None:
        outcomes = self._sender.outcomes(result, len(self._claims), self._read)
        try:
            self._tell(outcomes)
        finally:
            # They lead back here, and a circle would have to wait for the garbage collector.
            claims, self._claims = self._claims, []
            for claim, outcome in zip(claims, outcomes, strict=True):
                self._sender.answers.put((claim, outcome))


class _Asking(_Call):
    """A question whether the transport is ready."""

    __slots__ = ("_answers", "answer")

    def __init__(self, to: _Placed, answers: SimpleQueue[tuple[Claim, Outcome] | None]) -> None:
        super().__init__(to, context=copy_context())
        self.answer: Future[Any] = Future()
        self._answers = answers

    def arrive(self, result: _Result) -> None:
        try:
            self.answer.set_result(result())
        except BaseException as error:  # noqa: BLE001 - the future hands it on
            self.answer.set_exception(error)
        self._answers.put(None)


def _read_send(answer: Any, _: int) -> list[Outcome]:
    return [as_outcome(answer)]


def _read_send_many(answers: Any, messages: int) -> list[Outcome]:
    if isinstance(answers, Outcome):
        return [answers] * messages
    # A text, or a mapping, has members too, and says nothing of any message.
    is_sequence = isinstance(answers, Iterable) and not isinstance(answers, str | bytes | Mapping)
    told: list[Outcome] = []
    try:
        for answer in answers if is_sequence else ():
            told.append(as_outcome(answer))  # noqa: PERF401 - a generator sends as it goes, and may raise on its way
    except BaseException as error:
        if len(told) <= messages:
            raise BrokenOff(told, error) from error
    if len(told) != messages:
        return [InDoubt(f"send_many returned {len(told)} outcomes for {messages} messages")] * messages
    return told


def _read_look_up(answer: Any, _: int) -> list[Outcome]:
    return [answer if isinstance(answer, Sent | NotSent) else _worker_lost()]


def _worker_lost(error: BaseException | None = None) -> InDoubt:
    besides = "" if error is None else f"; look_up raised {type(error).__name__}"
    return InDoubt(f"its worker was lost between claim and settle{besides}")


def _is_async(function: Callable[..., Any]) -> bool:
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


class _Job:
    """A call that waits for a thread. Either a thread takes it from `jobs`, or it is cancelled."""

    __slots__ = ("_is_cancelled", "_is_done", "_jobs", "call")

    def __init__(self, call: _Call, jobs: deque[_Job]) -> None:
        self.call = call
        self._jobs = jobs
        self._is_cancelled = False
        self._is_done = False

    def work(self, result: _Result) -> None:
        try:
            self.call.context.run(self.call.arrive, result)
        finally:
            self._is_done = True

    def cancel(self) -> bool:
        # Asked for each message of a batch.
        if not self._is_cancelled:
            with suppress(ValueError):
                self._jobs.remove(self)
                self._is_cancelled = self._is_done = True
        return self._is_cancelled

    def done(self) -> bool:
        return self._is_done


class _Threads:
    """Daemon threads, started as needed: unlike those of an executor, one that hangs keeps no process alive.

    One thread is woken at a time, and wakes the next before it does its job: all at once they would only wait for each
    other, and calls that take no time are made by a few of them.
    """

    def __init__(self, limit: int, loop: _EventLoop) -> None:
        self._limit = limit
        self._loop = loop
        self._jobs: deque[_Job] = deque()
        self._wake_ups: SimpleQueue[bool] = SimpleQueue()
        self._is_waking = False
        self._started = 0
        self._was_refused = False
        self._idle = 0
        self._lock = threading.Lock()

    def submit(self, call: _Call) -> _Job:
        job = _Job(call, self._jobs)
        self._jobs.append(job)
        if self._idle < len(self._jobs) and self._started < self._limit:
            self._start_one()
        self._wake_one()
        return job

    def _start_one(self) -> None:
        thread = threading.Thread(target=self._work, name=f"engagement-send-{self._started}", daemon=True)
        try:
            thread.start()
        except RuntimeError:  # The system has none left.
            if not self._started:
                raise
            if not self._was_refused:
                logger.warning("engagement.no_more_threads started=%d", self._started)
            self._was_refused = True
        else:
            self._started += 1

    def close(self) -> None:
        self._jobs.clear()  # Nothing begins after the end.
        for _ in range(self._started):
            self._wake_ups.put(False)  # noqa: FBT003 - whether somebody is needed

    def _wake_one(self) -> None:
        # Who is being woken sets this back before it looks for jobs, so it finds what was put there before.
        if not self._is_waking:
            self._is_waking = True
            self._wake_ups.put(True)  # noqa: FBT003

    def _work(self) -> None:
        while self._wait_for_jobs():
            self._is_waking = False
            while self._do_one():
                pass

    def _wait_for_jobs(self) -> bool:
        """Sleep until somebody is needed; return False at the end."""
        with self._lock:
            self._idle += 1
        is_needed = self._wake_ups.get()
        with self._lock:
            self._idle -= 1
        return is_needed

    def _do_one(self) -> bool:
        """Do a job, and return whether there was one.

        A function of its own: a thread that sleeps must not hold on to the messages that it sent last.
        """
        try:
            job = self._jobs.popleft()
        except IndexError:
            return False
        if self._jobs:
            self._wake_one()
        job.work(partial(self._result, job.call))
        return True

    def _result(self, call: _Call) -> Any:
        token = call.begin()
        try:
            answer = call.function(*call.arguments)
            # A plain function may return a coroutine, as a lambda does.
            return self._awaited(call, answer) if inspect.iscoroutine(answer) else answer
        finally:
            call.end(token)

    def _awaited(self, call: _Call, coroutine: Coroutine[Any, Any, Any]) -> Any:
        # The function has run: whether it sent something before it returned its coroutine, it alone knows.
        call.may_have_left = True

        async def checked() -> Any:
            with checked_lease():
                return await coroutine

        try:
            return self._loop.run(checked).result()
        finally:
            coroutine.close()  # If it could not be run, or the check failed, it was never begun.


class _Task:
    """A call in the event loop. It is over when its coroutine is, also if that was asked to end."""

    __slots__ = ("_call", "_is_asked_to_end", "_is_done", "_loop", "_task")

    def __init__(self, call: _Call, loop: asyncio.AbstractEventLoop) -> None:
        self._call = call
        self._loop = loop
        self._task: asyncio.Task[Any] | None = None
        self._is_asked_to_end = False
        self._is_done = False

    def start(self) -> None:
        """Begin, in the loop's thread."""
        self._task = self._loop.create_task(_outlived(self._work))
        self._task.add_done_callback(self._arrive)

    def cancel(self) -> bool:
        if not self._is_asked_to_end:  # Once, also for a batch: what it does in the end is not broken off again.
            self._is_asked_to_end = True
            self._loop.call_soon_threadsafe(self._cancel)
        return False

    def done(self) -> bool:
        return self._is_done

    async def _work(self) -> Any:
        token = self._call.begin()
        try:
            return await self._call.function(*self._call.arguments)
        finally:
            self._call.end(token)

    def _arrive(self, task: asyncio.Task[Any]) -> None:
        self._task = None
        self._is_done = True  # First, since a worker that has heard the answer looks whether the place is free.
        self._call.arrive(task.result)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


async def _outlived(function: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Await it, and let nothing that it raises end the event loop, in which others are being sent."""
    try:
        return await function()
    except (KeyboardInterrupt, SystemExit) as error:
        raise asyncio.CancelledError(type(error).__name__) from error


class _EventLoop:
    """One event loop in a thread of its own, started at the first `async def`."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    def submit(self, call: _Call) -> _Task:
        loop = self._started()
        task = _Task(call, loop)
        loop.call_soon_threadsafe(task.start, context=call.context)
        return task

    def run(self, function: Callable[[], Coroutine[Any, Any, Any]]) -> Future[Any]:
        try:
            loop = self._started()
        except (OSError, RuntimeError) as error:
            raise MayHaveLeft(f"no event loop could be started, {type(error).__name__}") from error
        return asyncio.run_coroutine_threadsafe(_outlived(function), loop)

    def _started(self) -> asyncio.AbstractEventLoop:
        with self._lock:
            if self._loop is None:
                loop = asyncio.new_event_loop()
                self._thread = threading.Thread(target=self._work, args=[loop], name="engagement-loop", daemon=True)
                self._thread.start()
                self._loop = loop
        return self._loop

    def close(self) -> None:
        self._is_closed = True
        if self._loop is not None and self._thread is not None:
            with suppress(RuntimeError):  # It may have stopped by itself just now.
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSE_SECONDS)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:  # At its end it cancels what is left.
            while not self._is_closed:
                # A task that a send began raises these out of the loop. Who awaits it is told.
                with suppress(KeyboardInterrupt, SystemExit):
                    runner.get_loop().run_forever()
