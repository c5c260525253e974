"""The two signals to stop: the first sets an event, the second ends the process."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress


@contextmanager
def stopped_by_signals() -> Iterator[threading.Event]:
    """Hand out an event that the first SIGTERM or SIGINT sets; the second ends the process at once.

    A thread does both, fed by the interpreter's wake-up pipe. A handler in the main thread would wait while that thread
    is in a C call, and might set the event while it holds the event's lock.
    """
    stop = threading.Event()
    signals = (signal.SIGTERM, signal.SIGINT)
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    old_writer = signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    old_handlers = {number: signal.signal(number, lambda *_: None) for number in signals}
    watcher = threading.Thread(target=_watch_signals, args=(reader, frozenset(signals), stop), daemon=True)
    watcher.start()
    try:
        yield stop
    finally:
        for number, handler in old_handlers.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(old_writer)
        os.close(writer)
        watcher.join()
        os.close(reader)


def _watch_signals(reader: int, signals: frozenset[int], stop: threading.Event) -> None:
    while received := os.read(reader, 1):
        number = received[0]
        if number not in signals:
            continue
        name = signal.Signals(number).name
        if stop.is_set():
            _tell(f"{name} again: leaving at once; unfinished sends are recovered when their lease has run out")
            os._exit(128 + number)
        stop.set()
        _tell(f"{name}: stopping when the sends in hand are settled; once more to leave at once")


def _tell(line: str) -> None:
    # Written past Python's buffers and their locks. Nobody may read it any more.
    with suppress(OSError):
        os.write(2, f"engagement: {line}\n".encode())
