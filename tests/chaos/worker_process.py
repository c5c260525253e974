"""A worker in a process of its own, which kills or freezes itself where its orders say.

The product has no hook for this: commits are seen by SQLAlchemy's events, sends by the transport.
"""

import logging
import os
import random
import signal
import sys
import threading
import time
from datetime import timedelta
from operator import attrgetter
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, create_engine, event

from engagement import InDoubt, NotSent, Refused, Sent, Worker, exponential_backoff
from engagement.transports.cloud import WhatsAppCloud
from engagement.transports.dialects import DIALECTS
from engagement.transports.gateway import WhatsAppGateway

from .ledger import AppendOnlyFile, Ledger
from .orders import Orders, Point
from .sabotage import commit_sabotage

SEND_SECONDS = 0.004
GATEWAY_PATIENCE = timedelta(seconds=0.5)
PROVIDER_PATIENCE = timedelta(seconds=10)
PROVIDER_KEY = "s3cr3t-key-5b1c"
SESSIONS = {"evolution": "main", "waha": "default", "wuzapi": "default"}
NOTED = ("claims", "settles", "commits")
"""What is noted of a connection's transaction."""


class Fate:
    """Sends this process its signal at the point in its orders, after a note for those it leaves behind."""

    def __init__(self, orders: Orders, notes: AppendOnlyFile) -> None:
        self._orders = orders
        self._notes = notes
        self._left = orders.countdown
        self._lock = threading.Lock()
        self._is_near = False

    def passes(self, point: Point) -> None:
        """Go on, unless the orders name this point and it is time."""
        if point != self._orders.signal_at:
            return
        with self._lock:
            self._left -= 1
            if self._left != 0:
                return
        self._notes.add(os.getpid(), point)
        if point is Point.IN_SEND:
            # The send goes on meanwhile: it is in the ledger by then, or not.
            self._is_near = True
            threading.Thread(target=self._strike_soon, daemon=True).start()
        else:
            self._strike()

    def wait_if_near(self) -> None:
        """Keep a send in hand until the end that has been ordered for it."""
        if self._is_near:
            threading.Event().wait()

    def _strike_soon(self) -> None:
        time.sleep(random.Random(self._orders.seed).uniform(0, SEND_SECONDS))
        self._strike()

    def _strike(self) -> None:
        os.kill(os.getpid(), signal.Signals[self._orders.signal])


class LedgerTransport:
    """Sends into the ledger; the message's params say what else its far side does."""

    def __init__(self, orders: Orders, fate: Fate, notes: AppendOnlyFile) -> None:
        self.idempotent = orders.idempotent
        if orders.looks_up:
            self.look_up = self._look_up
        self._ledger = Ledger(Path(orders.ledger))
        self._fate = fate
        self._notes = notes
        self._random = random.Random(orders.seed)

    def send(self, message):
        """Put the message into the ledger, unless its far side will not have it."""
        self._fate.passes(Point.BEFORE_SEND)
        match message.message_params.get("act"):
            case "refuse":
                return Refused("no such number")
            case "fail":
                return NotSent("busy")
            case "fail_first" if message.attempt == 1:
                return NotSent("busy")
            case "wait":
                self._wait_for(message.message_params["release"])
        self._fate.passes(Point.IN_SEND)
        time.sleep(self._random.uniform(0, SEND_SECONDS / 2))
        self._ledger.record(message.idempotency_key, message.delivery_id, message.attempt)
        self._fate.wait_if_near()
        self._fate.passes(Point.AFTER_SEND)
        time.sleep(self._random.uniform(0, SEND_SECONDS / 2))
        return InDoubt("no answer") if message.message_params.get("act") == "doubt" else Sent(f"ledger-{message.id}")

    def _wait_for(self, pipe: str) -> None:
        self._notes.add(os.getpid(), "waiting")
        Path(pipe).read_text()  # until somebody opens it to write, and closes it

    def _look_up(self, message):
        is_known = any(entry.delivery_id == str(message.delivery_id) for entry in self._ledger.entries())
        return Sent("looked up") if is_known else NotSent("not in the ledger")


class Gateway(WhatsAppGateway):
    """Sends through a gateway that keeps the ledger."""

    def __init__(self, url: str, fate: Fate) -> None:
        super().__init__(
            url=url, key="k", render=attrgetter("idempotency_key"), answer_within=GATEWAY_PATIENCE, idempotent=False
        )
        self._fate = fate

    def send(self, message):
        """Send, unless it dies before."""
        self._fate.passes(Point.BEFORE_SEND)
        self._fate.passes(Point.IN_SEND)
        outcome = super().send(message)
        self._fate.wait_if_near()
        self._fate.passes(Point.AFTER_SEND)
        return outcome


class Providers:
    """Sends each message through the provider that its type names."""

    idempotent = False

    def __init__(self, urls: dict[str, str], fate: Fate) -> None:
        given = {"render": attrgetter("idempotency_key"), "answer_within": PROVIDER_PATIENCE}
        self._fate = fate
        self._by_type: dict[str, Any] = {
            name: WhatsAppGateway(url=url, key=PROVIDER_KEY, session=SESSIONS[name], dialect=DIALECTS[name], **given)
            for name, url in urls.items()
            if name in DIALECTS
        }
        if "cloud" in urls:
            self._by_type["cloud"] = WhatsAppCloud(
                phone_number_id="106540352242922", token=PROVIDER_KEY, base_url=urls["cloud"], **given
            )

    def send(self, message):
        """Send, unless it dies before."""
        self._fate.passes(Point.BEFORE_SEND)
        self._fate.passes(Point.IN_SEND)
        transport = self._by_type[message.message_type]
        outcome = transport.send(message)
        # A provider that answers nothing would be left alone for longer each time, and the day be spent waiting.
        transport._client.trouble.note_success()  # noqa: SLF001
        self._fate.wait_if_near()
        self._fate.passes(Point.AFTER_SEND)
        return outcome


def transport_of(orders: Orders, fate: Fate, notes: AppendOnlyFile) -> Any:
    if orders.providers is not None:
        return Providers(orders.providers, fate)
    return LedgerTransport(orders, fate, notes) if orders.gateway is None else Gateway(orders.gateway, fate)


def statuses(cursor) -> set[str]:
    """Read the statuses that a statement returned, and leave its rows to be read again: they may have expired."""
    place = [column.name for column in cursor.description].index("status")
    found = {row[place] for row in cursor}
    if found:
        cursor.scroll(0, "absolute")
    return found


class CommitWatch:
    """Passes the points before and after the commits of claims and of settlements."""

    def __init__(self, engine: Engine, fate: Fate) -> None:
        self._fate = fate
        event.listen(engine, "after_cursor_execute", self._note)
        event.listen(engine, "commit", self._before_commit)
        event.listen(engine, "rollback", self._forget)
        # The first that is heard of a connection after its commit.
        event.listen(engine, "checkin", self._after_commit)

    def _note(self, conn, cursor, _statement, parameters, *_):
        if "busy" in parameters and "worker" in parameters and "sending" in statuses(cursor):
            conn.info["claims"] = True
        # None, if it repeats what was committed and not acknowledged.
        if "settlements" in parameters and cursor.rowcount > 0:
            conn.info["settles"] = True

    def _before_commit(self, conn):
        if conn.info.get("settles"):
            self._fate.passes(Point.BEFORE_SETTLE_COMMIT)
        if conn.info.get("claims"):
            self._fate.passes(Point.BEFORE_CLAIM_COMMIT)
        conn.info["commits"] = True

    def _forget(self, conn):
        for name in () if conn.invalidated else NOTED:
            conn.info.pop(name, None)

    def _after_commit(self, dbapi_connection, record):
        claims, settles, commits = (record.info.pop(name, False) for name in NOTED)
        if dbapi_connection is None or not commits:
            return
        if settles:
            self._fate.passes(Point.AFTER_SETTLE_COMMIT)
        if claims:
            self._fate.passes(Point.AFTER_CLAIM_COMMIT)


def end_with_parent() -> None:
    sys.stdin.read()
    os._exit(1)


def main() -> None:
    orders = Orders.loads(sys.argv[1])
    logging.basicConfig(level=logging.INFO, format=f"%(asctime)s {os.getpid()} %(levelname)s %(message)s")
    threading.Thread(target=end_with_parent, daemon=True).start()
    stop = threading.Event()
    signal.signal(signal.SIGTERM, lambda *_: stop.set())
    notes = AppendOnlyFile(Path(orders.notes))
    fate = Fate(orders, notes)
    connect_args: dict[str, Any] = {"application_name": "chaos worker"}
    if not orders.prepares:
        connect_args["prepare_threshold"] = None
    engine = create_engine(orders.url, connect_args=connect_args)
    CommitWatch(engine, fate)
    if orders.sabotage is not None:
        commit_sabotage(orders.sabotage, engine)
    worker = Worker(
        engine,
        transport_of(orders, fate, notes),
        in_order=orders.in_order,
        concurrency=orders.concurrency,
        lease=timedelta(seconds=orders.lease_seconds),
        max_retries=orders.max_retries,
        backoff=exponential_backoff(timedelta(milliseconds=50), factor=1),
        worker_name=str(os.getpid()),
        poll_interval=timedelta(milliseconds=100),
    )
    notes.add(os.getpid(), "started")
    worker.run(stop)


if __name__ == "__main__":
    main()
