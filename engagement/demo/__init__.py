"""`engagement demo`: a day of the queue, on a PostgreSQL that is gone afterwards.

The events are in `day`, the failures of its sends in `trouble`, the worker that is killed in `lost_worker`, the
provider that reports later in `provider`, the page of its day in `page`.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from typing import NoReturn

from rich.console import Console
from sqlalchemy import create_engine

from engagement import migrations
from engagement._operating.temporary_postgres import temporary_postgres
from engagement.demo.day import Day
from engagement.demo.page import is_wanted, show_page

WIDTH_WHEN_PIPED = 110
SEND_AGAIN_SECONDS = 0.5
"""A lost signal is sent again after this time. Until then Python reports the loss, and would lose it again."""


def run_demo(screen: Console | None = None, *, waits: bool = False, with_page: bool | None = None) -> None:
    """Run the demo on standard output, or on `screen`. It leaves no process and no file, also when it is interrupted.

    If it `waits`, Enter begins each step. It ends in the admin page of its day if it is told so; with None a person at
    a terminal is asked.
    """
    screen = screen or _standard_output()
    with _unwinding_on_signals(), ExitStack() as stack:
        screen.print("[bold]A day of the queue.[/] Everybody here is made up, and nothing leaves this terminal.")
        with screen.status("starting a PostgreSQL"):
            server = stack.enter_context(temporary_postgres())
            engine = create_engine(server.url)
            stack.callback(engine.dispose)
            migrations.upgrade(engine)
        Day(screen, engine, partial(_wait_for_enter, screen) if waits else lambda: None).run()
        if is_wanted(screen) if with_page is None else with_page:
            show_page(screen, engine)
    screen.print("\nThe PostgreSQL of this demo is stopped, and its files are gone.", style="dim")


def _standard_output() -> Console:
    screen = Console(highlight=False)
    return screen if screen.is_terminal else Console(highlight=False, width=WIDTH_WHEN_PIPED)


def _wait_for_enter(screen: Console) -> None:
    with suppress(EOFError):  # Nobody is there to wait for.
        screen.input("\n[dim]Enter goes on: [/]")


@contextmanager
def _unwinding_on_signals() -> Iterator[None]:
    """Let SIGTERM unwind as SIGINT does. Both also if they were ignored (a script's `demo &`)."""

    def leave(number: int, _: object) -> NoReturn:
        # The process ends. SQLAlchemy's pool would tell of each connection that it finds in the middle of a statement.
        logging.disable()
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        sys.exit(128 + number)

    def send_again(lost: sys.UnraisableHookArgs) -> None:
        # A signal may come while Python collects an object. Its exception is then dropped, and the demo would run on.
        number = {KeyboardInterrupt: signal.SIGINT, SystemExit: signal.SIGTERM}.get(lost.exc_type)
        if number is None:
            sys.__unraisablehook__(lost)
        else:
            timers.append(threading.Timer(SEND_AGAIN_SECONDS, os.kill, (os.getpid(), number)))
            timers[-1].start()

    timers: list[threading.Timer] = []
    before = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGINT)}
    hook, sys.unraisablehook = sys.unraisablehook, send_again
    try:
        yield
    finally:
        for timer in timers:
            timer.cancel()
        sys.unraisablehook = hook
        for number, handler in before.items():
            signal.signal(number, handler)
