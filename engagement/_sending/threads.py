"""The threads in which plain functions of a transport run."""

from __future__ import annotations

import inspect
import threading
from collections import deque
from collections.abc import Coroutine
from contextlib import suppress
from functools import partial
from queue import SimpleQueue
from typing import Any

from engagement._logging import logger
from engagement._sending.call import Call, checked_lease
from engagement._sending.event_loop import EventLoop


class _Job:
    """A call that waits for a thread. Either a thread takes it from `jobs`, or it is cancelled."""

    __slots__ = ("_is_cancelled", "_jobs", "call")

    def __init__(self, call: Call, jobs: deque[_Job]) -> None:
        self.call = call
        self._jobs = jobs
        self._is_cancelled = False

    def cancel(self) -> bool:
        # Asked for each message of a batch.
        if not self._is_cancelled:
            with suppress(ValueError):
                self._jobs.remove(self)
                self._is_cancelled = True
        return self._is_cancelled


class Threads:
    """Daemon threads, started as needed: unlike those of an executor, one that hangs keeps no process alive.

    See docs/decisions.md#2026-11-24--sends-run-in-threads-of-our-own-as-daemons.

    One thread is woken at a time, and wakes the next before it does its job: all at once they would only wait for each
    other, and calls that take no time are made by a few of them.
    """

    def __init__(self, limit: int, loop: EventLoop) -> None:
        self._limit = limit
        self._loop = loop
        self._jobs: deque[_Job] = deque()
        self._wake_ups: SimpleQueue[bool] = SimpleQueue()
        self._is_waking = False
        self._started = 0
        self._was_refused = False
        self._idle = 0
        self._lock = threading.Lock()

    def submit(self, call: Call) -> _Job:
        job = _Job(call, self._jobs)
        self._jobs.append(job)
        try:
            if self._idle < len(self._jobs) and self._started < self._limit:
                self._start_one()
        except RuntimeError:
            job.cancel()
            raise
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
        # A thread that wakes sets this back before it looks for jobs, so it finds every job that was put there before.
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
        job.call.context.run(job.call.arrive, partial(self._result, job.call))
        return True

    def _result(self, call: Call) -> Any:
        token = call.begin()
        try:
            answer = call.function(*call.arguments)
            # A plain function may return a coroutine, as a lambda does.
            return self._awaited(call, answer) if inspect.iscoroutine(answer) else answer
        finally:
            call.end(token)

    def _awaited(self, call: Call, coroutine: Coroutine[Any, Any, Any]) -> Any:
        # The function has run: whether it sent something before it returned its coroutine, it alone knows.
        call.may_have_left = True

        async def checked() -> Any:
            with checked_lease():
                return await coroutine

        try:
            return self._loop.run(checked).result()
        finally:
            coroutine.close()  # If it could not be run, or the check failed, it was never begun.
