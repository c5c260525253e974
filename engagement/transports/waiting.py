"""One thread of the process looks, writes, waits and reads on all connections. A caller waits for a lock.

At each system call another thread may take the interpreter, and the caller waits to get it back. With 500 callers that
each look, write, wait and read, this waiting costs more than the exchanges do.
docs/decisions.md#2026-11-29--one-http-exchange-on-h11-and-a-socket
"""

from __future__ import annotations

import os
import selectors
import socket
import threading
from collections import deque
from collections.abc import Callable, Generator
from contextlib import suppress
from time import monotonic
from typing import Any, Generic, Protocol, TypeVar

from engagement.transports.http import ConnectError, ConnectTimeout, ReadError, ReadTimeout

READ, WRITE = selectors.EVENT_READ, selectors.EVENT_WRITE
STUCK_SECONDS = 5.0
"""How long a caller waits, after the deadline, for the thread to tell whether a byte was written. Then: in doubt."""

T = TypeVar("T")
Steps = Generator[tuple[int, type[Exception]], None, T]
"""The steps on a connection. They yield READ or WRITE to wait, and the error to raise there at the deadline."""


class Watched(Protocol):
    """A connection, as the thread needs it. The socket does not block."""

    socket: socket.socket
    is_free: bool
    """Whether the connection is kept, and watched further, at the end of its steps."""
    watched_for: int
    running: Run[Any] | None

    def is_clean(self) -> bool:
        """Whether the connection is open, and no byte has come on it."""


class Run(Generic[T]):
    """Steps on a connection, and how they ended."""

    def __init__(self, connection: Watched, steps: Steps[T]) -> None:
        self.connection = connection
        self.steps = steps
        self.late: type[Exception] = ConnectTimeout
        self.is_given_up = False
        self.value: T
        self.error: BaseException | None = None
        self.is_over = threading.Lock()
        self.is_over.acquire()


class Waiter:
    """The thread. Methods that are not public run in it."""

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._bell, self._heard = socket.socketpair()
        self._bell.settimeout(0)
        self._selector.register(self._heard, READ)
        self._jobs: deque[tuple[Callable[[Any], None], Any]] = deque()
        self._over: list[Run[Any]] = []
        self._is_asleep = False
        self.has_ended = False
        threading.Thread(target=self._work, name="engagement-exchanges", daemon=True).start()

    def run(self, connection: Watched, steps: Steps[T], deadline: float) -> T:
        """Run the steps and return their result. `ConnectTimeout` or `ConnectError` if they were not begun."""
        run = Run(connection, steps)
        is_over = False
        try:
            self.soon(self._begin, run)
            is_over = run.is_over.acquire(timeout=max(deadline - monotonic(), 0))
        finally:
            if not is_over:  # Late, or interrupted: end the steps, for which nobody waits any more.
                run.is_given_up = True
                self.soon(self._give_up, run)
                is_over = run.is_over.acquire(timeout=STUCK_SECONDS)
        if not is_over:
            raise ReadTimeout
        try:
            if run.error is not None:
                raise run.error
            return run.value
        finally:
            del run  # The error's traceback holds this frame, and `run` holds the error: a circle.

    def close(self, connection: Watched) -> None:
        """Close a connection once its steps are over."""
        self.soon(self._close, connection)

    def soon(self, job: Callable[[Any], None], given: object) -> None:
        """Give the thread a job. It is woken once, for all jobs that come before it is awake."""
        self._jobs.append((job, given))
        try:
            if self._is_asleep:
                self._is_asleep = False
                with suppress(BlockingIOError):
                    self._bell.send(b"\0")
        except OSError:
            self.has_ended = True  # The host has closed all descriptors: nothing wakes the thread any more.
        except BaseException:  # Interrupted before the thread was woken: let the next job wake it.
            self._is_asleep = True
            raise
        if self.has_ended:
            self._refuse_jobs()

    def end(self) -> None:
        """Close everything, and fail the runs. Call it in the thread, or in a child process, which has no thread."""
        self.has_ended = True
        self._refuse_jobs()
        for connection in [key.data for key in self._selector.get_map().values() if key.data is not None]:
            if connection.running is not None:
                connection.running.error = ReadError()
                self._over.append(connection.running)
            _close_descriptor(connection.socket)
        self._tell()
        for ours in (self._bell, self._heard, self._selector):
            _close_descriptor(ours)

    def _refuse_jobs(self) -> None:
        """Do what jobs need when there is no thread for them. Any thread may: each job is taken once."""
        with suppress(IndexError):
            while True:
                job, given = self._jobs.popleft()
                if job == self._begin:
                    given.error = ConnectError()
                    given.is_over.release()
                elif job == self._close:
                    _close_descriptor(given.socket)

    def _work(self) -> None:
        try:
            while True:
                self._turn()
        except BaseException:  # noqa: BLE001 - a host that closes all descriptors of the process (a daemon) closes ours
            self.end()

    def _turn(self) -> None:
        self._is_asleep = True  # Before the look for jobs: a job that is added after the look wakes the thread.
        ready = self._selector.select(0 if self._jobs else None)
        self._is_asleep = False
        for key, _ in ready:
            if key.data is None:
                self._heard.recv(4096)
            elif key.data.running is not None:
                self._go_on(key.data.running)
            elif not key.data.is_clean():
                self._close(key.data)
        for _ in range(len(self._jobs)):
            job, given = self._jobs.popleft()
            job(given)
        self._tell()

    def _tell(self) -> None:
        """Let the callers of ended runs go, all at once: each of them takes the interpreter from the thread."""
        for run in self._over:
            run.is_over.release()
        self._over.clear()

    def _begin(self, run: Run[Any]) -> None:
        if run.is_given_up:
            run.error = ConnectTimeout()
            self._finish(run)
            return
        run.connection.running = run
        try:
            # Before it is written to: a child that is forked meanwhile closes its copy.
            _watch(self._selector, run.connection, READ)
        except Exception:  # noqa: BLE001 - no room for another
            run.error = ConnectError()
            self._finish(run)
        else:
            self._go_on(run)

    def _give_up(self, run: Run[Any]) -> None:
        if run.connection.running is run:
            self._go_on(run, run.late())

    def _go_on(self, run: Run[Any], error: Exception | None = None) -> None:
        try:
            wanted, run.late = next(run.steps) if error is None else run.steps.throw(error)
            _watch(self._selector, run.connection, wanted)
        except StopIteration as end:
            run.value = end.value
            self._finish(run)
        except BaseException as failure:  # noqa: BLE001 - it is the caller's
            run.error = failure
            self._finish(run)

    def _finish(self, run: Run[Any]) -> None:
        _watch(self._selector, run.connection, READ if run.connection.is_free else 0)
        run.connection.running = None
        self._over.append(run)

    def _close(self, connection: Watched) -> None:
        _watch(self._selector, connection, 0)
        connection.socket.close()


def _close_descriptor(of: socket.socket | selectors.BaseSelector) -> None:
    with suppress(OSError):  # The host has closed it.
        of.close()


def _watch(selector: selectors.BaseSelector, connection: Watched, wanted: int) -> None:
    if wanted == connection.watched_for:
        return
    if not wanted:
        selector.unregister(connection.socket)
    elif connection.watched_for:
        selector.modify(connection.socket, wanted, connection)
    else:
        selector.register(connection.socket, wanted, connection)
    connection.watched_for = wanted


_waiter: Waiter | None = None
_lock = threading.Lock()


def the_waiter() -> Waiter:
    """Return the thread of this process. The first call starts it."""
    global _waiter  # noqa: PLW0603 - a process has one
    with _lock:
        if _waiter is None or _waiter.has_ended:
            _waiter = Waiter()
        return _waiter


def _begin_anew() -> None:
    """In a child process, close the copies of the parent's sockets.

    The selector is shared with the parent, whose thread watches on: it must not be told of the closing.
    """
    global _waiter, _lock  # noqa: PLW0603
    _lock = threading.Lock()
    if _waiter is not None and not _waiter.has_ended:
        _waiter.end()
    _waiter = None


os.register_at_fork(after_in_child=_begin_anew)
