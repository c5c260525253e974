"""The endpoint of receipts, as ASGI and as WSGI application: on real servers, with a provider that speaks any bytes."""

import asyncio
import logging
import re
import select
import socket
import threading
from contextlib import suppress
from datetime import timedelta

import pytest
from chaos.proxy import proxied
from commands import messages
from conftest import execute, in_thread, row, until, wait_until_blocked
from crashes.accidents import an_engine, is_true
from sqlalchemy import event
from sqlalchemy.ext.asyncio import create_async_engine

from engagement import migrations
from engagement._operating.temporary_postgres import temporary_postgres
from engagement.receipts import ReceiptsASGI, ReceiptsWSGI
from engagement.receipts.asgi import THREADS
from engagement.receipts.endpoint import MOST_BYTES
from receipts.served import (
    KEY,
    NUMBER,
    PATIENCE,
    Challenging,
    Provider,
    Tiny,
    about,
    answer_on,
    body_of,
    by_wsgiref,
    head,
    served,
    sign,
)

NOWHERE = "postgresql+psycopg://nobody@127.0.0.1:1/nothing"
GIVES_OPTIONS = pytest.mark.direct("it gives the server options at its start")


@pytest.fixture(name="kind", params=["asgi", "wsgi"])
def _kind(request):
    return request.param


@pytest.fixture(name="provider")
def _provider(kind, engine):
    with served(kind, engine, Challenging()) as provider:
        yield provider


@pytest.fixture(name="log")
def _log(caplog):
    """Return what was logged, once its request was answered. Nothing personal and no secret is ever in it."""
    caplog.set_level(logging.DEBUG)
    yield lambda: [
        record.getMessage()
        for record in caplog.records
        if record.name == "engagement" and "engagement.receipts_" in record.getMessage()
    ]
    # A client's and a server's own lines are theirs.
    ours = [caplog.handler.format(record) for record in caplog.records if record.name.split(".")[0] in OURS]
    assert not [line for line in ours if NUMBER in line or KEY.decode() in line]


OURS = {"engagement", "uvicorn", "asyncio", "sqlalchemy", "psycopg"}


@pytest.fixture(name="doubt")
def _doubt(engine):
    (message_id,) = messages(engine, "in_doubt")
    return message_id


def status_of(engine, message_id):
    return row(engine, message_id).status


# What a provider says ------------------------------------------------------------------------------------------------


def test_a_receipt_reaches_its_message(provider, engine, doubt, log):
    """The answer is 200 once it is recorded, also at a path below, and the repeated one changes nothing."""
    answer = provider.tell(about(engine, doubt))

    assert (answer.status, answer.text) == (200, "")
    assert status_of(engine, doubt) == "sent"
    before = row(engine, doubt)
    body = body_of(about(engine, doubt, "accepted"))
    assert provider.ask(body=body, path="/by/event", X_Signature=sign(body)).status == 200
    assert row(engine, doubt) == before
    assert log() == [
        "engagement.receipts_received provider=tiny receipts=1 recorded=1",
        "engagement.receipts_received provider=tiny receipts=1 recorded=0",
    ]


def test_two_requests_at_once_about_one_message_are_both_taken(provider, engine, doubt, log):
    """One records it, and the other then finds it known."""
    said = about(engine, doubt)
    with engine.begin() as holder:
        holder.exec_driver_sql("SELECT FROM engagement_message_queue FOR UPDATE")
        answers = [in_thread(provider.tell, {**said, "event": "accepted"}) for _ in range(2)]
        wait_until_blocked(engine, 2)

    assert [answer.result(PATIENCE).status for answer in answers] == [200, 200]
    assert status_of(engine, doubt) == "sent"
    assert sorted(line.rpartition("=")[2] for line in log()) == ["0", "1"]


def test_a_request_without_receipts_touches_no_database(kind, log):
    """An event that is no receipt is taken, though the database is away."""
    with an_engine(NOWHERE) as nowhere, served(kind, nowhere, Tiny()) as provider:
        assert provider.tell().status == 200

    assert log() == ["engagement.receipts_received provider=tiny receipts=0 recorded=0"]


@GIVES_OPTIONS
def test_the_table_may_lie_in_a_schema(kind, empty_engine):
    """Where `schema` says."""
    migrations.upgrade(empty_engine, schema="crm")
    with an_engine(empty_engine.url, connect_args={"options": "-c search_path=crm"}) as at_home:
        (message_id,) = messages(at_home, "in_doubt")
        said = about(at_home, message_id)

    with served(kind, empty_engine, Tiny(), schema="crm") as provider:
        assert provider.tell(said).status == 200

    with empty_engine.connect() as connection:
        assert connection.exec_driver_sql("SELECT status FROM crm.engagement_message_queue").scalar() == "sent"


@GIVES_OPTIONS
def test_an_answer_is_given_for_what_is_durable(kind, engine, doubt):
    """Whatever the host's setting: a provider that was told 200 does not repeat it after a crash of the server."""
    seen = []
    said = about(engine, doubt)
    with an_engine(engine.url, connect_args={"options": "-c synchronous_commit=off"}) as careless:
        event.listen(careless, "commit", lambda connection: seen.append(synchronous_commit(connection)))
        with served(kind, careless, Tiny()) as provider:
            assert provider.tell(said).status == 200

    assert seen == ["on"]


def synchronous_commit(connection):
    cursor = connection.connection.driver_connection.execute("SHOW synchronous_commit")
    return cursor.fetchone()[0]


# What is refused -----------------------------------------------------------------------------------------------------


def test_a_request_without_the_right_signature_changes_nothing(provider, engine, doubt, log):
    """Not signed, signed for another body, or signed twice."""
    body = body_of(about(engine, doubt))
    before = row(engine, doubt)
    for signature in ({}, {"X_Signature": sign(b"another")}, {"X_Signature": ""}, {"X_Signature": "\xff\xfe"}):
        answer = provider.ask(body=body, **signature)
        assert (answer.status, answer.text) == (401, "x-signature is missing or wrong")

    assert row(engine, doubt) == before
    line = "engagement.receipts_refused provider=tiny status=401 error=Unsigned 'x-signature is missing or wrong'"
    assert log() == [line] * 4


def test_a_header_that_comes_twice_is_neither_of_both(provider, engine, doubt):
    """A proxy may have looked at the other one."""
    body = body_of(about(engine, doubt))
    for first, second in ((sign(body), "x"), ("x", sign(body)), (sign(body), sign(body))):
        assert provider.ask(body=body, X_Signature=first, x_signature=second).status == 401

    assert status_of(engine, doubt) == "in_doubt"


def test_the_name_of_a_header_may_be_written_in_any_case(provider, engine, doubt):
    """As HTTP has it."""
    body = body_of(about(engine, doubt))

    assert provider.ask(body=body, x_SIGNATURE=sign(body)).status == 200
    assert status_of(engine, doubt) == "sent"


def test_a_body_that_cannot_be_read_is_refused(provider, log):
    """The sender is told why."""
    answer = provider.ask(body=b"{", X_Signature=sign(b"{"))

    assert (answer.status, answer.text) == (400, "receipts: is missing")
    assert log() == [
        "engagement.receipts_refused provider=tiny status=400 error=UnreadableReceipts 'receipts: is missing'"
    ]


@pytest.mark.parametrize("method", ["HEAD", "PUT", "DELETE", "OPTIONS"])
def test_another_method_is_refused_before_a_body_is_read(kind, engine, provider, method):
    """The answer names those that there are; GET is one if the source has a handshake."""
    with provider.connect() as connection:
        connection.sendall(head(method, Content_Length="10"))  # And no body.
        answer = answer_on(connection, method)
    assert (answer.status, answer.headers["allow"], answer.text) == (405, "GET, POST", "")

    with served(kind, engine, Tiny()) as other:
        answer = other.ask("GET")
    assert (answer.status, answer.headers["allow"]) == (405, "POST")


def test_a_handshake_is_answered(provider, log):
    """In plain text, to whoever has the token."""
    answer = provider.ask("GET", path="/?number=a%20%3Cb%3E&token=right&empty=")
    assert (answer.status, answer.text) == (200, "a <b>")
    assert answer.headers["content-type"] == "text/plain; charset=utf-8"
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert log() == []

    for query in ("", "number=1", "number=1&token=wrong", "number=1&token=right&token=wrong"):
        assert provider.ask("GET", path=f"/?{query}").status == 403
    assert provider.ask("GET", path=f"/?{'a=1&' * 50}token=right&number=1").status == 400


# Too long, too slow, broken off --------------------------------------------------------------------------------------


def padded(body: bytes, length: int) -> bytes:
    return body.ljust(length)


def test_a_body_may_be_as_long_as_a_providers_longest(provider, engine, doubt):
    """And not a byte longer."""
    body = padded(body_of(about(engine, doubt)), MOST_BYTES)

    assert provider.ask(body=body, X_Signature=sign(body)).status == 200
    assert status_of(engine, doubt) == "sent"


@pytest.mark.parametrize("length", [str(MOST_BYTES + 1), "9" * 5_000])
def test_a_body_that_is_told_to_be_too_long_is_not_waited_for(provider, length, log):
    """It is refused while none of it was sent."""
    with provider.connect() as connection:
        connection.sendall(head(Content_Length=length))
        answer = answer_on(connection)

    assert answer.status in ({413} if len(length) < 10 else {413, 400, 431})  # h11 itself refuses so many digits.
    if answer.status == 413:
        reason = f"the body is longer than {MOST_BYTES} bytes"
        assert answer.text == reason
        assert log() == [f"engagement.receipts_refused provider=tiny status=413 error=TooLong '{reason}'"]


def test_a_body_that_grows_too_long_is_not_read_to_its_end(provider, engine, doubt):
    """Nothing told its length, and it has no end."""
    body = padded(body_of(about(engine, doubt)), MOST_BYTES + 1)
    with provider.connect() as connection:
        connection.sendall(head(Transfer_Encoding="chunked", X_Signature=sign(body)))
        connection.sendall(b"%x\r\n%b\r\n" % (len(body), body))
        assert answer_on(connection).status == 413

    assert status_of(engine, doubt) == "in_doubt"


def test_a_body_may_come_in_chunks(provider, engine, doubt):
    """As some HTTP clients send it."""
    body = body_of(about(engine, doubt))
    chunks = b"".join(b"%x\r\n%b\r\n" % (len(part), part) for part in (body[:7], body[7:], b""))
    with provider.connect() as connection:
        connection.sendall(head(Transfer_Encoding="chunked", X_Signature=sign(body)) + chunks)
        assert answer_on(connection).status == 200

    assert status_of(engine, doubt) == "sent"


@pytest.mark.parametrize("length", ["-1", "1e3", "0x10", "1_0", "\xb2"])
def test_a_length_that_is_no_number_is_refused(provider, length):
    """By the server, or by us."""
    with provider.connect() as connection:
        connection.sendall(head(Content_Length=length))
        assert answer_on(connection).status == 400


@pytest.mark.parametrize("framing", [{"Content_Length": "1000"}, {"Transfer_Encoding": "chunked"}])
def test_a_client_that_goes_in_the_middle_of_a_body_changes_nothing(provider, engine, doubt, log, framing):
    """Also if what has arrived is signed and could be read."""
    body = body_of(about(engine, doubt))
    part = body if "Content_Length" in framing else b"%x\r\n%b\r\n" % (len(body), body)
    with provider.connect() as connection:
        connection.sendall(head(X_Signature=sign(body), **framing) + part)
        connection.shutdown(socket.SHUT_WR)
        until(log)

    assert log() == ["engagement.receipts_refused provider=tiny status=400 error=Incomplete 'the body ends early'"]
    assert status_of(engine, doubt) == "in_doubt"


def test_a_body_that_comes_too_slowly_is_refused(engine, log):
    """Though a byte comes now and then; the connection is closed. With WSGI that is the server's matter."""
    with (
        served("asgi", engine, Tiny(), patience=timedelta(milliseconds=300)) as provider,
        provider.connect() as connection,
    ):
        connection.sendall(b"POST / HTTP/1.1\r\nHost: engagement\r\nContent-Length: 100000\r\n\r\n")
        until(lambda: select.select([connection], [], [], 0)[0] or connection.sendall(b" "))
        answer = answer_on(connection)
        assert (answer.status, answer.headers["connection"]) == (408, "close")
        with suppress(ConnectionResetError):
            assert connection.recv(1) == b""

    assert log() == [
        "engagement.receipts_refused provider=tiny status=408 error=TooSlow 'the body did not arrive in time'"
    ]


def test_wsgi_does_not_guess_where_a_body_ends(engine, doubt):
    """A server that does not say so would wait for more, for ever."""
    body = body_of(about(engine, doubt))
    with by_wsgiref(ReceiptsWSGI(engine, Tiny())) as port, Provider(port).connect() as connection:
        chunks = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
        connection.sendall(head(Transfer_Encoding="chunked", X_Signature=sign(body)) + chunks)
        assert answer_on(connection).status == 411

    assert status_of(engine, doubt) == "in_doubt"


# The database is away ------------------------------------------------------------------------------------------------


@pytest.fixture(name="server", scope="module")
def _server():
    with temporary_postgres() as server:
        with an_engine(server.url) as engine:
            migrations.upgrade(engine)
        yield server


def test_what_comes_while_the_database_is_away_is_recorded_when_it_is_repeated(kind, server, log):
    """The provider is told to come again."""
    with an_engine(server.url) as engine:
        first, second = messages(engine, "in_doubt", "in_doubt")
        said = about(engine, first), about(engine, second)
        with served(kind, engine, Tiny()) as provider:
            assert provider.tell(said[0]).status == 200
            server.stop("immediate")
            away = provider.tell(said[1])
            server.start()
            assert (away.status, away.headers["retry-after"], away.text) == (503, "10", "")
            assert provider.tell(said[1]).status == 200
        assert [status_of(engine, each) for each in (first, second)] == ["sent", "sent"]
        execute(engine, "TRUNCATE engagement_message_queue")

    assert log()[1].startswith("engagement.receipts_refused provider=tiny status=503 error=")


def test_a_commit_that_was_not_acknowledged_is_not_answered_with_200(kind, engine, doubt):
    """It may not have happened. The repeated request finds it known."""
    said = about(engine, doubt)
    with (
        proxied(engine.url) as proxy,
        an_engine(proxy.url) as through,
        served(kind, through, Tiny()) as provider,
    ):
        proxy.lose_next_commit()
        assert provider.tell(said).status == 503
        assert provider.tell(said).status == 200

    assert status_of(engine, doubt) == "sent"


def test_a_commit_that_no_standby_has_is_not_answered_with_200(kind, server, log):
    """If the standby is promoted, it did not happen. A server whose wait for it is cancelled warns of that."""
    with an_engine(server.url) as engine, served(kind, engine, Tiny()) as provider:
        (message_id,) = messages(engine, "in_doubt")
        said = about(engine, message_id)
        set_standbys(server, "nobody")
        try:
            answer = in_thread(provider.tell, said)
            waiting = "FROM pg_stat_activity WHERE wait_event = 'SyncRep'"
            until(lambda: is_true(engine, f"SELECT pg_cancel_backend(pid) {waiting}"))
            assert answer.result(PATIENCE).status == 503
        finally:
            set_standbys(server, "")
        assert provider.tell(said).status == 200
        assert status_of(engine, message_id) == "sent"
        execute(engine, "TRUNCATE engagement_message_queue")

    assert log()[0] == "engagement.receipts_refused provider=tiny status=503 error=NotReplicated"


def set_standbys(server, names: str) -> None:
    """Tell the server which standbys each commit waits for, and return when it knows."""
    with an_engine(server.url, isolation_level="AUTOCOMMIT") as engine, engine.connect() as connection:
        connection.exec_driver_sql(f"ALTER SYSTEM SET synchronous_standby_names = '{names}'")
        connection.exec_driver_sql("SELECT pg_reload_conf()")
        until(lambda: connection.exec_driver_sql("SHOW synchronous_standby_names").scalar() == names)


def test_a_message_that_somebody_holds_for_long_is_waited_for_a_while(kind, engine, doubt, log):
    """Then the provider is told to come again, and no connection is left waiting."""
    said = about(engine, doubt)
    with served(kind, engine, Tiny(), patience=timedelta(milliseconds=300)) as provider:
        with engine.begin() as holder:
            holder.exec_driver_sql("SELECT FROM engagement_message_queue FOR UPDATE")
            assert provider.tell(said).status == 503
            wait_until_blocked(engine, 0)
        assert provider.tell(said).status == 200

    assert status_of(engine, doubt) == "sent"
    assert re.fullmatch(".* status=503 error=(OperationalError 57014|TimeoutError)", log()[0])


def test_threads_that_hang_let_others_be_refused_in_time(engine, doubt):
    """A database that swallows every packet takes all threads of an ASGI application, but not its event loop."""
    is_over = threading.Event()

    class Hanging(Tiny):
        def read(self, body, headers):
            is_over.wait(PATIENCE)
            return super().read(body, headers)

    said = about(engine, doubt)
    with served("asgi", engine, Hanging(), patience=timedelta(milliseconds=300)) as provider:
        answers = [in_thread(provider.tell, said) for _ in range(THREADS + 2)]
        assert [answer.result(PATIENCE).status for answer in answers] == [503] * (THREADS + 2)
        assert provider.ask("PUT").status == 405
        assert status_of(engine, doubt) == "in_doubt"
        is_over.set()
        assert provider.tell(said).status == 200

    assert status_of(engine, doubt) == "sent"


def test_a_database_that_lacks_our_table_is_no_reason_to_forget(kind, empty_engine, log):
    """The provider repeats it, and somebody migrates."""
    with served(kind, empty_engine, Tiny()) as provider:
        answer = provider.tell({"event": "read", "provider_message_id": "wamid.1"})

    assert (answer.status, answer.text) == (500, "")
    assert log() == ["engagement.receipts_refused provider=tiny status=500 error=ProgrammingError 42P01"]


def test_an_error_of_a_source_shows_its_place_and_nobody(kind, engine, log, caplog):
    """Its text and its traceback may repeat the request, so neither reaches a log or the sender."""

    class Broken(Tiny):
        def read(self, body, headers):
            return {}[body.decode()]

    with served(kind, engine, Broken()) as provider:
        answer = provider.tell()

    assert (answer.status, answer.text) == (500, "")
    (line,) = log()
    assert re.fullmatch(rf".* status=500 error=KeyError at {re.escape(__file__)}:\d+", line)
    assert not [record for record in caplog.records if record.exc_info]


# Made wrongly --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("made", [ReceiptsASGI, ReceiptsWSGI])
def test_what_cannot_work_is_told_at_once(made, engine):
    """And names the argument."""
    with pytest.raises(ValueError, match=r"^engine: must be a sync Engine of psycopg 3"):
        made(create_async_engine(engine.url), Tiny())
    with pytest.raises(ValueError, match=r"^patience: must be a timedelta of more than zero"):
        made(engine, Tiny(), patience=timedelta(0))
    with pytest.raises(TypeError, match=r"^source: must be an object with name and read"):
        made(engine, Tiny)
    with pytest.raises(ValueError, match=r"^schema: "):
        made(engine, Tiny(), schema="")


def test_a_websocket_is_closed_and_a_lifespan_is_none_of_ours(engine):
    """Neither is an error in the host's log."""
    app, sent = ReceiptsASGI(engine, Tiny()), []

    async def send(message):
        sent.append(message)

    asyncio.run(app({"type": "websocket"}, None, send))
    assert sent == [{"type": "websocket.close"}]
    with pytest.raises(NotImplementedError):
        asyncio.run(app({"type": "lifespan"}, None, send))
