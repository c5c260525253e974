"""The hosts in `examples/`, over HTTP: a message and what it is about are stored together, or neither is."""

import importlib.util
import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from types import ModuleType

import httpx
import pytest
import uvicorn
from conftest import new_message, queue, row
from sqlalchemy import Engine, text
from werkzeug.serving import make_server

from engagement import migrations

EXAMPLES = Path(__file__).parent.parent / "examples"
PATIENCE = 20
PHONE = "5511999990000"


def load(name: str) -> ModuleType:
    """Run an example as a module of its own, which connects to DATABASE_URL."""
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(name="database_url")
def _database_url(empty_engine, monkeypatch) -> None:
    monkeypatch.setenv("DATABASE_URL", empty_engine.url.render_as_string(hide_password=False))


@contextmanager
def running(start, stop) -> Iterator[None]:
    thread = threading.Thread(target=start)
    thread.start()
    try:
        yield
    finally:
        stop()
        thread.join(PATIENCE)
        assert not thread.is_alive()


@contextmanager
def served_by_uvicorn(app) -> Iterator[httpx.Client]:
    """Run an ASGI app with its lifespan, and stop it as a signal would."""
    server = uvicorn.Server(uvicorn.Config(app, log_config=None, lifespan="on", ws="none", loop="asyncio"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        address = f"http://127.0.0.1:{listening.getsockname()[1]}"
        with (
            running(lambda: server.run(sockets=[listening]), lambda: setattr(server, "should_exit", True)),
            httpx.Client(base_url=address, timeout=PATIENCE, trust_env=False) as client,
        ):
            yield client


@contextmanager
def served_by_werkzeug(app) -> Iterator[httpx.Client]:
    """Run a WSGI app."""
    server = make_server("127.0.0.1", 0, app, threaded=True)
    address = f"http://127.0.0.1:{server.server_port}"
    with (
        running(server.serve_forever, server.shutdown),
        httpx.Client(base_url=address, timeout=PATIENCE, trust_env=False) as client,
    ):
        yield client
    server.server_close()


@pytest.fixture(name="members")
def _members(database_url) -> Iterator[httpx.Client]:
    with served_by_uvicorn(load("fastapi_host").app) as client:
        yield client


@pytest.fixture(name="flask_host")
def _flask_host(database_url) -> Iterator[ModuleType]:
    host = load("flask_host")
    assert host.app.test_cli_runner().invoke(args=["create-tables"]).exit_code == 0
    yield host
    host.engine.dispose()


@pytest.fixture(name="appointments")
def _appointments(flask_host) -> Iterator[httpx.Client]:
    with served_by_werkzeug(flask_host.app) as client:
        yield client


def register(client: httpx.Client, user_id: str, phone: str = PHONE) -> httpx.Response:
    return client.post("/members", params={"user_id": user_id, "phone": phone})


def book(client: httpx.Client, user_id: str, phone: str = PHONE, **delay) -> httpx.Response:
    starts_at = datetime(2030, 1, 31, 9, tzinfo=UTC) if not delay else datetime.now(UTC) + timedelta(**delay)
    form = {"user_id": user_id, "phone": phone, "starts_at": starts_at.isoformat()}
    return client.post("/appointments", data=form)


def users(engine: Engine, table: str) -> list[str]:
    with engine.connect() as connection:
        return list(connection.execute(text(f"SELECT user_id FROM {table} ORDER BY user_id")).scalars())


def refuse_commits(engine: Engine, table: str) -> None:
    """Make each transaction that touches `table` fail, as late as it can: when it commits."""
    with engine.begin() as connection:
        connection.execute(
            text("CREATE FUNCTION refuse() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN RAISE 'no'; END $$")
        )
        connection.execute(
            text(
                f"CREATE CONSTRAINT TRIGGER refuse AFTER INSERT ON {table} DEFERRABLE INITIALLY DEFERRED "
                "FOR EACH ROW EXECUTE FUNCTION refuse()"
            )
        )


@pytest.mark.parametrize("name", ["fastapi_host", "flask_host"])
def test_an_example_is_short(name):
    """A host is taken in at a glance."""
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 80


# FastAPI, async


def test_a_member_is_registered_with_a_welcome(members, empty_engine):
    """What the request stored and what it queued were committed together, before the answer."""
    answer = register(members, "ana")

    assert (answer.status_code, answer.json()) == (201, {"welcome": True})
    assert users(empty_engine, "members") == users(empty_engine, "engagement_message_queue") == ["ana"]


def test_a_member_that_cannot_be_stored_gets_no_welcome(members, empty_engine):
    """The request rolls back after it has queued, and nothing is left of the message."""
    register(members, "ana")

    assert register(members, "bia").status_code == 409
    assert users(empty_engine, "members") == users(empty_engine, "engagement_message_queue") == ["ana"]


def test_a_commit_that_fails_is_no_success(members, empty_engine):
    """The client is answered after the commit, not before it."""
    register(members, "ana", phone="5511999990001")
    refuse_commits(empty_engine, "members")

    assert register(members, "bia").status_code == 500
    assert users(empty_engine, "members") == users(empty_engine, "engagement_message_queue") == ["ana"]


def test_bad_input_is_told_without_repeating_it(members, empty_engine):
    """The field and the problem are the client's to read; the number is nobody's."""
    answer = register(members, "ana", phone="not a number")

    assert answer.status_code == 422
    assert list(answer.json()["detail"]) == ["destination_jid"]
    assert "not a number" not in answer.text
    assert users(empty_engine, "members") == []


def test_the_worker_beside_the_app_sends_and_stops_with_it(database_url, empty_engine):
    """What is due is sent while the app runs, and the app's end waits for the send in hand to be recorded."""
    migrations.upgrade(empty_engine)
    (message_id,) = queue(empty_engine, new_message())
    host = load("fastapi_host")
    is_sending, may_finish = threading.Event(), threading.Event()

    def send(_message):
        is_sending.set()
        assert may_finish.wait(PATIENCE)

    host.send = send
    with served_by_uvicorn(host.app):
        assert is_sending.wait(PATIENCE)
        threading.Timer(0.2, may_finish.set).start()

    assert may_finish.is_set()
    assert row(empty_engine, message_id).status == "sent"


# Flask, sync


def test_an_appointment_is_booked_with_a_reminder(appointments, empty_engine):
    """What the request stored and what it queued were committed together."""
    answer = book(appointments, "ana")

    assert (answer.status_code, answer.json()) == (201, {"reminder": True})
    assert users(empty_engine, "appointments") == users(empty_engine, "engagement_message_queue") == ["ana"]
    with empty_engine.connect() as connection:
        due = connection.scalar(text("SELECT scheduled_for FROM engagement_message_queue"))
    assert due == datetime(2030, 1, 30, 9, tzinfo=UTC)


def test_an_appointment_that_is_taken_gets_no_reminder(appointments, empty_engine):
    """The request rolls back after it has queued, and nothing is left of the message."""
    book(appointments, "ana")

    assert book(appointments, "bia").status_code == 409
    assert users(empty_engine, "appointments") == users(empty_engine, "engagement_message_queue") == ["ana"]


def test_a_booking_whose_commit_fails_is_no_success(appointments, empty_engine):
    """The client is answered after the commit, not before it."""
    book(appointments, "ana", phone="5511999990001", hours=1)
    refuse_commits(empty_engine, "appointments")

    assert book(appointments, "bia").status_code == 500
    assert users(empty_engine, "appointments") == users(empty_engine, "engagement_message_queue") == ["ana"]


def test_a_bad_booking_is_told_without_repeating_it(appointments, empty_engine):
    """The field and the problem are the client's to read; the number is nobody's."""
    answer = book(appointments, "ana", phone="not a number")

    assert (answer.status_code, list(answer.json())) == (422, ["destination_jid"])
    assert "not a number" not in answer.text
    assert users(empty_engine, "appointments") == []


def test_the_cron_job_sends_what_is_due(appointments, flask_host, empty_engine):
    """Only the reminder whose day has come is sent, and the second run has nothing to do."""
    book(appointments, "ana", hours=23)
    book(appointments, "bia", hours=25)
    job = flask_host.app.test_cli_runner()

    first, second = (job.invoke(args=["send-messages"]).output for _ in range(2))

    assert first.startswith(f"reminder.appointment to {PHONE}@s.whatsapp.net\nProcessResult(processed=1, succeeded=1")
    assert second.startswith("ProcessResult(processed=0")
    with empty_engine.connect() as connection:
        statuses = connection.execute(text("SELECT user_id, status FROM engagement_message_queue ORDER BY user_id"))
        assert statuses.all() == [("ana", "sent"), ("bia", "pending")]
