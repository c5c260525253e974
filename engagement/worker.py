"""The two doors to delivery: one run for a cron job, or a worker for a process of its own."""

from __future__ import annotations

import os
import socket
import threading
from datetime import timedelta
from functools import partial
from typing import TypedDict, Unpack

from sqlalchemy import Engine

from engagement.delivery import Delivery
from engagement.housekeeping import Housekeeping
from engagement.messages import checked_flag
from engagement.outcomes import Backoff, Classify, classify_exception, exponential_backoff
from engagement.own_transactions import for_own_transactions
from engagement.repository import LONGEST_AGE
from engagement.sending import Transport
from engagement.tally import ProcessResult

LONGEST_NAME = 200


class DeliveryOptions(TypedDict, total=False):
    """The keywords that `process_message_queue` and `Worker` share; `Worker` describes them."""

    concurrency: int
    lease: timedelta
    max_retries: int
    min_interval: timedelta
    send_timeout: timedelta | None
    backoff: Backoff
    classify: Classify | None
    strict: bool
    worker_name: str | None
    schema: str | None


def process_message_queue(
    engine: Engine,
    transport: Transport,
    *,
    limit: int | None = None,
    stop: threading.Event | None = None,
    **options: Unpack[DeliveryOptions],
) -> ProcessResult:
    """Send what is due, until nothing is or `limit` messages were claimed; return what was done. For a cron job.

    Any number of these and of `Worker.run` may run at once. `stop` ends it early: nothing is claimed any more, and
    sends in hand finish. Raises what the database raises if it cannot be reached at first, or for longer than a
    lease; sends in hand are settled before anything is raised, if that is possible.
    """
    if limit is not None and limit < 0:
        raise ValueError("limit: must not be negative")
    worker = Worker(engine, transport, **options)
    return Delivery(worker, stop or threading.Event(), until_empty=True, limit=limit).run()


class Worker:
    """Sends what is due, as long as it runs.

    - `concurrency`: how many messages are in hand at once, and the largest batch of a transport with `send_many`.
      Plain functions are called in that many threads.
    - `lease`: how long a claim holds if its worker dies. A living worker extends it.
    - `max_retries`: after so many failures a message is `failed`.
    - `min_interval`: the time between the starts of two sends of this worker.
    - `send_timeout`: a send without an answer for so long is in doubt. Should it still answer `Sent`, that resolves
      the doubt. None leaves time-outs to the transport.
    - `backoff(n)`: how long to wait after the n-th failure.
    - `classify(exception)`: which outcome an exception of the transport means; see `classify_exception`, the default.
    - `strict`: the default rule calls every exception in doubt that does not prove that nothing was sent.
    - `worker_name`: what `claimed_by` begins with; default: host and process.
    - `poll_interval`: how soon a message that becomes due is noticed by an idle worker.
    - `schema`: where the table is, if not on the search path.
    - `prune_older_than`: every hour, blank finished messages that were last due longer ago. None leaves that to you.
    - `verify_every`: how often to look for broken promises, each of which is logged. None leaves that to you.

    Of many workers one prunes, and one verifies, at a time. Each takes one more connection of the engine's pool while
    it is at it, which must have one to spare, or leases would not be extended meanwhile. No send waits for it.
    """

    def __init__(
        self,
        engine: Engine,
        transport: Transport,
        *,
        concurrency: int = 1,
        lease: timedelta = timedelta(minutes=5),
        max_retries: int = 3,
        min_interval: timedelta = timedelta(0),
        send_timeout: timedelta | None = None,
        backoff: Backoff = exponential_backoff(),  # noqa: B008 - it has no state
        classify: Classify | None = None,
        strict: bool = False,
        worker_name: str | None = None,
        poll_interval: timedelta = timedelta(seconds=5),
        schema: str | None = None,
        prune_older_than: timedelta | None = None,
        verify_every: timedelta | None = None,
    ) -> None:
        _check(concurrency >= 1, "concurrency", "must be at least 1")
        _check(lease > timedelta(0), "lease", "must be positive")
        _check(max_retries >= 1, "max_retries", "must be at least 1")
        _check(min_interval >= timedelta(0), "min_interval", "must not be negative")
        _check(send_timeout is None or send_timeout > timedelta(0), "send_timeout", "must be positive")
        _check(isinstance(backoff(1), timedelta), "backoff", "must return a timedelta")
        is_name = worker_name is None or (worker_name.isprintable() and len(worker_name) <= LONGEST_NAME)
        _check(is_name, "worker_name", f"must be printable, and at most {LONGEST_NAME} characters")
        _check(poll_interval > timedelta(0), "poll_interval", "must be positive")
        keeps_long_enough = prune_older_than is None or timedelta(0) <= prune_older_than <= LONGEST_AGE
        _check(keeps_long_enough, "prune_older_than", f"must be from zero to {LONGEST_AGE.days} days")
        _check(verify_every is None or verify_every > timedelta(0), "verify_every", "must be positive")
        self.engine = for_own_transactions(engine, schema)
        self.transport = transport
        self.concurrency = concurrency
        self.lease = lease
        self.max_retries = max_retries
        self.min_interval = min_interval.total_seconds()
        self.send_timeout = None if send_timeout is None else send_timeout.total_seconds()
        self.backoff = backoff
        self.classify: Classify = classify or partial(classify_exception, strict=checked_flag("strict", strict))
        self.worker_name = worker_name or f"{socket.gethostname()}:{os.getpid()}"
        self.poll_interval = poll_interval.total_seconds()
        self.schema = schema
        self.prune_older_than = prune_older_than
        self.verify_every = verify_every

    def run(self, stop: threading.Event | None = None) -> ProcessResult:
        """Send what is due until `stop` is set; then let the sends in hand finish, settle them, and return.

        A lost database is waited for. An error that waiting does not mend, such as a missing table, is raised.
        """
        with Housekeeping(self).beside():
            return Delivery(self, stop or threading.Event(), until_empty=False, limit=None).run()


def _check(holds: bool, name: str, problem: str) -> None:
    if not holds:
        raise ValueError(f"{name}: {problem}")
