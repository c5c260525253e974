"""The command `engagement` as tests run it: in this process, as a process of its own, and on a terminal."""

import os
import pty
import signal
import subprocess
import sys
import termios
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).parents[1]
PATIENCE = 20


class Ran(NamedTuple):
    """What came of a command."""

    status: int
    out: str
    err: str


def url_of(engine) -> str:
    return engine.url.render_as_string(hide_password=False)


def program(*arguments, on=None, environment=None, **options):
    """Start the command as a process of its own, in a session of its own, as a terminal or a supervisor does."""
    ours = {"PYTHONPATH": str(ROOT)} | ({} if on is None else {"ENGAGEMENT_DATABASE_URL": url_of(on)})
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    command = [sys.executable, "-m", "engagement.cli", *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | ours | (environment or {}), start_new_session=True, **pipes)


@contextmanager
def killed_at_the_end(process):
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


@contextmanager
def terminal():
    """Hand out a function that returns what a terminal showed, and the terminal's other end for a process."""
    ours, theirs = pty.openpty()
    shown = bytearray()

    def read():
        with open(ours, "rb", buffering=0, closefd=False) as source:
            try:
                while some := source.read(4096):
                    shown.extend(some)
            except OSError:  # the last process that had it is gone
                return

    reader = threading.Thread(target=read)
    reader.start()

    def screen():
        if reader.is_alive():
            os.close(theirs)
            reader.join(PATIENCE)
        return shown.decode()

    try:
        yield screen, theirs
    finally:
        screen()
        os.close(ours)


def talk(*arguments, on, answer, meanwhile=lambda: None, interrupted_at=None):
    """Run a command as a person does on a terminal of 80 columns, answer its question, and return how it ended.

    `interrupted_at` is what must be on the screen for them to press Ctrl-C.
    """
    ours, theirs = pty.openpty()
    termios.tcsetwinsize(theirs, (50, 80))
    environment = {"TERM": "xterm"}
    with killed_at_the_end(
        program(*arguments, on=on, stdin=theirs, stdout=theirs, stderr=theirs, environment=environment)
    ) as process:
        os.close(theirs)
        shown = b""
        asked = False
        with suppress(OSError):  # the command, which had the other end, is gone
            while some := os.read(ours, 4096):
                shown += some
                if not asked and b"[y/N]" in shown:
                    asked = True
                    meanwhile()
                    os.write(ours, answer.encode() + b"\n")
                if interrupted_at is not None and interrupted_at in shown:
                    interrupted_at = None
                    process.send_signal(signal.SIGINT)
        os.close(ours)
        process.wait(PATIENCE)
    return Ran(process.returncode, shown.decode().replace("\r\n", "\n"), "")
