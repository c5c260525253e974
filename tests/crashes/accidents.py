"""How the tests make an accident: a worker that is run, lost or held up, and a commit that goes wrong."""

import logging
import threading
from contextlib import contextmanager
from datetime import timedelta
from functools import partial

from conftest import execute, in_thread, row, until
from sqlalchemy import create_engine, event, text

from engagement import Sent, Worker
from engagement._claim import START, Claim
from engagement._delivery import database as claims
from engagement._delivery.database import Holder

PATIENCE_SECONDS = 20.0
LATER = timedelta(hours=1)


def is_true(engine, sql) -> bool:
    with engine.connect() as connection:
        return bool(connection.scalar(text(sql)))


class Running:
    """A worker in a thread, as `with` has it; what it raises comes out at the end."""

    def __init__(self, engine, transport, **options) -> None:
        given = {"poll_interval": timedelta(milliseconds=20)} | options
        self.stop = threading.Event()
        self._run = partial(Worker(engine, transport, **given).run, self.stop)

    def __enter__(self):
        self.run = in_thread(self._run)
        return self

    def __exit__(self, kind, *_):
        self.stop.set()
        if kind is None:
            self.result = self.run.result(PATIENCE_SECONDS)


def lose(engine, *ids, name="dead worker") -> list[Claim]:
    """Claim what is due as a worker that is never heard of again; return the claims when their lease has run out."""
    dead = Holder(name, timedelta(milliseconds=1))
    with engine.begin() as connection:
        claimed = claims.claim(
            connection,
            dead,
            limit=len(ids),
            after=START,
            busy=[],
            one_per_destination=False,
            idempotent=True,
        )
    assert sorted(claim.message.id for claim in claimed.claims) == sorted(ids)
    until(lambda: is_true(engine, "SELECT max(lease_expires_at) < now() FROM engagement_message_queue"))
    return claimed.claims


def events_of(engine, message_id) -> list[str]:
    return [entry["event"] for entry in row(engine, message_id).history]


class Transport:
    """Sends by `send`, and notes every call."""

    def __init__(self, send=lambda _: Sent(), look_up=None, *, idempotent=False) -> None:
        self._send = send
        self._look_up = look_up
        self.idempotent = idempotent
        self.sends = []
        self.look_ups = []
        if look_up is not None:
            self.look_up = self._note_look_up

    def send(self, message):
        """Note it and send."""
        self.sends.append(message)
        return self._send(message)

    def _note_look_up(self, message):
        self.look_ups.append(message)
        return self._look_up(message)


def is_claim(parameters) -> bool:
    return "busy" in parameters


def is_settlement(parameters) -> bool:
    return "settlements" in parameters


def is_take_over(parameters) -> bool:
    return "recoverer" in parameters and "worker" not in parameters


def is_extension(parameters) -> bool:
    return "names" in parameters and "held" in parameters


def at_first_commit(engine, kind, act) -> None:
    """Call `act(connection)` just before the first commit of a transaction with a statement of the kind."""
    pending = [act]

    @event.listens_for(engine, "after_cursor_execute")
    def note(conn, cursor, _statement, parameters, *_):
        if kind(parameters) and cursor.rowcount > 0:
            conn.info["is_it"] = True

    @event.listens_for(engine, "commit")
    def commits(conn):
        if conn.info.pop("is_it", False) and pending:
            pending.pop()(conn)


@contextmanager
def an_engine(url, **options):
    engine = create_engine(url, **options)
    try:
        yield engine
    finally:
        engine.dispose()


def terminate(engine, connection) -> None:
    """End the backend of a connection, and return when it is gone."""
    # Asked, since what a pooler tells its client is a number of its own.
    (pid,) = connection.connection.dbapi_connection.execute("SELECT pg_backend_pid()").fetchone()
    assert execute(engine, "SELECT pg_terminate_backend(:pid)", pid=pid).scalar_one()
    until(lambda: not is_true(engine, f"SELECT exists(SELECT FROM pg_stat_activity WHERE pid = {pid})"))


@contextmanager
def heard(event_name: str):
    """Hand out an event that is set when the worker logs it."""
    is_heard = threading.Event()
    handler = logging.Handler()
    handler.emit = lambda record: is_heard.set() if record.getMessage().startswith(event_name) else None
    logger = logging.getLogger("engagement")
    logger.addHandler(handler)
    try:
        yield is_heard
    finally:
        logger.removeHandler(handler)
