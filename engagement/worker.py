"""The two doors to delivery: one run for a cron job, or a worker for a process of its own."""

from __future__ import annotations

import threading
from typing import Unpack

from sqlalchemy import Engine

from engagement._delivery.evidence import KeptReceipts
from engagement._delivery.options import DeliveryOptions, Options, WorkerOptions
from engagement._delivery.run import deliver
from engagement._delivery.tally import ProcessResult
from engagement._operating.housekeeping import Housekeeping
from engagement._sending.protocols import Transport
from engagement._sql.own_transactions import for_own_transactions


def process_message_queue(
    engine: Engine,
    transport: Transport,
    *,
    limit: int | None = None,
    stop: threading.Event | None = None,
    **options: Unpack[DeliveryOptions],
) -> ProcessResult:
    """Send the due messages until none is left, or `limit` were claimed. Return the counts. For a cron job.

    Any number of these and of `Worker.run` may run at once. `stop` ends it early: nothing is claimed any more, and
    sends in hand finish. Raises what the database raises if it cannot be reached at first, or for longer than a
    lease; sends in hand are settled before anything is raised, if that is possible. If sends that outlasted
    `send_timeout` hang in every place, it ends within seconds, and leaves the other messages to the next run. At its
    end it records the kept receipts whose messages are known by now.
    """
    if limit is not None and limit < 0:
        raise ValueError("limit: must not be negative")
    given = Options(**options)
    ours = _for_delivery(engine, given)
    stop = stop or threading.Event()
    result = deliver(ours, transport, given, stop, until_empty=True, limit=limit)
    KeptReceipts(ours, given.on_settled).look(stop)
    return result


class Worker:
    """Sends due messages, as long as it runs.

    - `message_types`: send only messages of these types. It holds for recovery too: the messages of a lost worker need
      one that takes their types.
    - `excluding`: leave messages of these types to others (`["otp"]`, beside a worker with `message_types=["otp"]`).
    - `in_order`: send to a destination one message at a time, the oldest first, across all workers with this option.
      Without it, each worker does so among its own sends.
    - `sender`: the name of the number or account that it sends from, yours to choose. `engagement pause --sender` stops
      all workers that name it.
    - `concurrency`: how many messages are in hand at once, and the largest batch of a transport with `send_many`.
      Plain functions are called in that many threads.
    - `lease`: how long a claim holds if its worker dies. A living worker extends it.
    - `max_retries`: after so many failures a message is `failed` (3: at its third; a postponed send is none).
    - `min_interval`: the time between the starts of two sends of this worker (2 s: 30 a minute, of two workers 60).
    - `send_timeout`: a send without an answer for so long is in doubt. Should it still answer `Sent`, that resolves
      the doubt. None leaves time-outs to the transport.
    - `backoff(n)`: how long to wait after the n-th failure.
    - `classify(exception)`: which outcome an exception of the transport means; see `classify_exception`, the default.
    - `strict`: the default rule calls every exception in doubt that does not prove that nothing was sent (a
      `KeyError`).
    - `on_settled(connection, message, status)`: called in the transaction that settles a message, once for each
      settlement that is recorded. Work that it does there is committed with the settlement, or not at all (it writes
      `goodbye_sent_at` if `status` is `sent`). Its error undoes its own part, is logged, and changes nothing else. It
      can neither commit nor keep the connection; see `docs/settling.md`.
    - `worker_name`: what `claimed_by` begins with; default: host and process.
    - `poll_interval`: how soon an idle worker notices a message that was queued as due. One that becomes due later is
      sent at that moment.
    - `wake_up`: be woken by hosts that called `wake_workers`, and start their messages within milliseconds. It takes
      one connection more, on which it listens. If it does not hear (a pooler in transaction mode), it logs that once.
      It polls all the same, so that a lost wake-up costs a poll.
    - `listen_on`: an engine of a direct connection to listen on, if `engine` goes through a pooler.
    - `schema`: where the table is, if not on the search path.
    - `prune_older_than`: every hour, blank finished messages that were last due longer ago. None leaves that to you.
    - `verify_every`: how often to look for broken promises, each of which is logged. None leaves that to you.

    Each minute it records the kept receipts whose messages are known by now, and drops those of more than a day.
    Of many workers one prunes, and one verifies, at a time. Each task takes one more connection of the engine's pool
    while it is at it. The pool must have one to spare, or leases would not be extended meanwhile. No send waits for it.
    """

    def __init__(self, engine: Engine, transport: Transport, **options: Unpack[WorkerOptions]) -> None:
        self._options = Options(**options)
        self._engine = _for_delivery(engine, self._options)
        self._transport = transport

    def run(self, stop: threading.Event | None = None) -> ProcessResult:
        """Send due messages until `stop` is set; then let the sends in hand finish, settle them, and return.

        A lost database is waited for. An error that waiting does not mend, such as a missing table, is raised.
        """
        with Housekeeping(self._engine, self._options).beside():
            return deliver(self._engine, self._transport, self._options, stop or threading.Event())


def _for_delivery(engine: Engine, options: Options) -> Engine:
    return for_own_transactions(engine, options.schema, lends=options.on_settled is not None)
