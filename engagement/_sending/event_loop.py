"""The event loop in which the `async def` functions of a transport run."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable, Coroutine
from concurrent.futures import Future
from contextlib import suppress
from typing import Any

from engagement._sending.call import Call, MayHaveLeft

CLOSE_SECONDS = 5.0
"""How long the event loop may take to cancel its last tasks."""


class _Task:
    """A call in the event loop. It is over when its coroutine is, also if that was asked to end."""

    __slots__ = ("_call", "_is_asked_to_end", "_loop", "_task")

    def __init__(self, call: Call, loop: asyncio.AbstractEventLoop) -> None:
        self._call = call
        self._loop = loop
        self._task: asyncio.Task[Any] | None = None
        self._is_asked_to_end = False

    def start(self) -> None:
        """Begin, in the loop's thread."""
        self._task = self._loop.create_task(_outlived(self._work))
        self._task.add_done_callback(self._arrive)

    def cancel(self) -> bool:
        if not self._is_asked_to_end:  # Once, also for a batch: a second request would break off its clean-up.
            self._is_asked_to_end = True
            self._loop.call_soon_threadsafe(self._cancel)
        return False

    async def _work(self) -> Any:
        token = self._call.begin()
        try:
            return await self._call.function(*self._call.arguments)
        finally:
            self._call.end(token)

    def _arrive(self, task: asyncio.Task[Any]) -> None:
        self._task = None
        self._call.arrive(task.result)

    def _cancel(self) -> None:
        if self._task is not None:
            self._task.cancel()


async def _outlived(function: Callable[[], Coroutine[Any, Any, Any]]) -> Any:
    """Await it. An exit that it raises must not end the event loop, in which others are being sent."""
    try:
        return await function()
    except (KeyboardInterrupt, SystemExit) as error:
        raise asyncio.CancelledError(type(error).__name__) from error


class EventLoop:
    """One event loop in a thread of its own, started at the first `async def`."""

    def __init__(self) -> None:
        self._loop: asyncio.AbstractEventLoop | None = None
        self._thread: threading.Thread | None = None
        self._is_closed = False
        self._lock = threading.Lock()

    def submit(self, call: Call) -> _Task:
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
                thread = threading.Thread(target=self._work, args=[loop], name="engagement-loop", daemon=True)
                try:
                    thread.start()
                except RuntimeError:  # The system has none left.
                    loop.close()
                    raise
                self._loop, self._thread = loop, thread
        return self._loop

    def close(self) -> None:
        self._is_closed = True
        if self._loop is not None and self._thread is not None:
            with suppress(RuntimeError):  # It may have stopped by itself just now.
                self._loop.call_soon_threadsafe(self._loop.stop)
            self._thread.join(CLOSE_SECONDS)

    def _work(self, loop: asyncio.AbstractEventLoop) -> None:
        with asyncio.Runner(loop_factory=lambda: loop) as runner:  # At its end it cancels the tasks that are left.
            while not self._is_closed:
                # A task that a send began raises these out of the loop. Its own `await` raises them too.
                with suppress(KeyboardInterrupt, SystemExit):
                    runner.get_loop().run_forever()
