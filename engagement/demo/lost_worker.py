"""A worker that is killed in the middle of a send: `python -m engagement.demo`."""

from __future__ import annotations

import signal
import subprocess
import sys
from datetime import timedelta
from pathlib import Path

from sqlalchemy import Engine

import engagement

LEASE = timedelta(seconds=1.5)
"""Minutes in real life: the demo has less time."""


def kill_a_worker_in_a_send(engine: Engine) -> int:
    """Start a worker, wait until it is in the middle of a send, kill it, and return its process id."""
    url = engine.url.render_as_string(hide_password=False)
    command = [sys.executable, "-m", "engagement.demo", url]
    with subprocess.Popen(  # noqa: S603 - ourselves
        command,
        cwd=Path(engagement.__file__).parents[1],  # where the package is found, wherever we were started
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        process_group=0,  # not the terminal's: Ctrl-C is for the demo to obey
    ) as worker:
        assert worker.stdout is not None
        try:
            worker.stdout.readline()  # Now it is in a send, or has ended.
        finally:
            worker.kill()
    if worker.returncode != -signal.SIGKILL:
        raise RuntimeError(f"the worker of the demo was not killed in a send: it ended with {worker.returncode}")
    return worker.pid
