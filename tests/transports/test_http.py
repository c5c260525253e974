"""What an HTTP failure proves: the table that is documented, and real failures on loopback."""

import re
import ssl
import threading
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime

import h11
import loopback
import pytest
from gateways import close_clients, outgoing  # noqa: F401 - autouse
from loopback import Reply, serving

from engagement import InDoubt, NotSent, Postpone, Refused, Sent
from engagement.transports import http
from engagement.transports.client import IDLE_CONNECTION_SECONDS, STOPPED_ATTEMPTS, Finding, Prepared, ProviderClient
from engagement.transports.connection import LARGEST_ANSWER
from engagement.transports.http import Answer, Proof, Silence, what_it_proves
from engagement.transports.trouble import LONGEST_PAUSE

PREPARED = Prepared("/messages", b'{"text":"hello"}')


def client(url: str, **options) -> ProviderClient:
    # Authorities are loaded, which takes 50 ms, only where a certificate is checked.
    given = {
        "headers": {},
        "answer_within": timedelta(seconds=5),
        "connect_within": timedelta(seconds=2),
        "verify": False,
    }
    return ProviderClient("test", url, **given | options)


def accepted(answer: Answer) -> Sent | None:
    """Take only JSON with an id for a success, as most providers are read."""
    return Sent(answer.json["id"]) if answer.is_success and answer.json else None


def deliver(client: ProviderClient, **fields):
    return client.deliver(outgoing(**fields), PREPARED, accepted)


def rows() -> list[tuple[str, Proof]]:
    lines = [line.strip() for line in what_it_proves.__doc__.splitlines() if line.strip().startswith("|")]
    cells = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [(failure, Proof(proof)) for failure, proof, _ in cells[2:]]


def named_in(failure: str) -> list[int]:
    return [int(number) for number in re.findall(r"\b[2-5][0-9]{2}\b", failure)]


RETRY_AFTER = {"retry-after": "3"}


@pytest.mark.parametrize(("failure", "proof"), [row for row in rows() if row[0].startswith(("3", "4", "5"))])
def test_each_status_in_the_table_proves_what_it_says(failure, proof):
    """A status of the table proves what its row says, with Retry-After or without."""
    for status in named_in(failure):
        for given in (RETRY_AFTER, {}):
            assert what_it_proves(Answer(status, given)) is proof, status


@pytest.mark.parametrize(("century", "failure"), [(200, "2xx"), (400, "every other 4xx"), (500, "every other 5xx")])
def test_every_other_status_has_a_row(century, failure):
    """A status that the table does not name proves what the row of its class says."""
    named = {status for row, _ in rows() for status in named_in(row)}
    others = [status for status in range(century, century + 100) if status not in named]
    proof = dict(rows())[failure]

    assert len(others) > 50
    assert {what_it_proves(Answer(status)) for status in others} == {proof}


def test_each_error_has_a_row():
    """Every error of an exchange proves what its row says; those that no row names are in doubt."""
    by_name = {
        name: proof
        for failure, proof in rows()
        for name in re.findall(r"[A-Z][A-Za-z]+(?:Error|Timeout|Request)", failure)
    }
    kinds = [kind for kind in vars(http).values() if isinstance(kind, type) and issubclass(kind, Exception)]

    assert by_name.keys() == {kind.__name__ for kind in kinds if kind is not http.NothingWritten}
    for kind in (*kinds[1:], OSError, TimeoutError, ConnectionRefusedError, h11.LocalProtocolError):
        assert what_it_proves(Silence(kind)) is by_name.get(kind.__name__, Proof.IN_DOUBT), kind


def test_only_refusals_that_cannot_have_left_are_final():
    """Nothing that may have left is called refused or not sent: no 2xx, no 5xx but those that say so, no silence."""
    harmless = {Proof.NOT_SENT, Proof.WAIT, Proof.STOPPED, Proof.REFUSED}

    assert {status for status in range(200, 300) if what_it_proves(Answer(status)) in harmless} == set()
    for headers in ({}, RETRY_AFTER):
        proven = {status for status in range(500, 600) if what_it_proves(Answer(status, headers)) in harmless}
        assert proven == {505, 511}


def test_only_a_4xx_that_denies_the_act_is_believed():
    """A 4xx that is assigned to nothing, or may come after the act, proves nothing: neither refused nor not sent."""
    doubtful = {status for status in range(400, 500) if what_it_proves(Answer(status)) is Proof.IN_DOUBT}

    assert {406, 408, 409, 412, 416, 417, 418, 419, 420, 423, 424, 430, 440, 444, 449, 460, 463, 494, 499} <= doubtful
    assert len(doubtful) == 100 - 20
    refused = {status for status in range(400, 500) if what_it_proves(Answer(status)) is Proof.REFUSED}
    assert refused == {400, 413, 422}


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ("0", timedelta(0)),
        ("120", timedelta(minutes=2)),
        ("86400", timedelta(days=1)),
        ("86401", timedelta(days=1)),
        ("9999999999", timedelta(days=1)),
        ("99999999999", timedelta(days=1)),
        ("0000000000120", timedelta(minutes=2)),
        ("-1", None),
        ("1.5", None),
        ("٣", None),
        ("soon", None),
        ("", None),
    ],
)
def test_retry_after_in_seconds(given, expected):
    """Retry-After counts if it is a number of seconds, and never for longer than a day."""
    assert Answer(503, {"retry-after": given}).retry_after == expected


def test_retry_after_as_a_date():
    """A date is read by the clock of the server that gave it, else by ours; a past one is now."""
    now = datetime(2026, 11, 24, 12, tzinfo=UTC)
    on_its_clock = {"retry-after": format_datetime(now + timedelta(seconds=90)), "date": format_datetime(now)}
    on_ours = {"retry-after": format_datetime(datetime.now(UTC) + timedelta(seconds=90))}
    far = {"retry-after": "Fri, 31 Dec 9999 23:59:59 GMT"}
    past = {"retry-after": format_datetime(datetime.now(UTC) - timedelta(hours=1))}

    assert Answer(503, on_its_clock).retry_after == timedelta(seconds=90)
    assert timedelta(seconds=80) < Answer(503, on_ours).retry_after <= timedelta(seconds=90)
    assert Answer(503, past).retry_after == timedelta(0)
    assert Answer(503, far).retry_after == timedelta(days=1)


# Real failures. Each test also counts what arrived: nothing is retried.


def test_a_success_is_sent_and_the_connection_is_used_again():
    """Two messages go over one connection, each as one request with the prepared body."""
    with serving(lambda _: Reply(201, {"id": "m1"})) as server:
        one = client(server.url)

        assert [deliver(one), deliver(one)] == [Sent("m1"), Sent("m1")]
        assert [(request.method, request.path, request.body) for request in server.received] == [
            ("POST", "/messages", b'{"text":"hello"}')
        ] * 2
        assert server.received[0].headers["content-type"] == "application/json"
        assert server.connections == 1


def test_an_idle_connection_that_the_server_closed_costs_no_doubt():
    """A connection that the server closed while it was idle is not written to: the next message makes a new one."""
    hung_up = threading.Event()

    def answer_and_hang_up(connection):
        connection.sendall(Reply(201, {"id": "m1"}).encode())
        loopback.hang_up(connection)
        hung_up.set()

    with serving(lambda _: answer_and_hang_up) as server:
        one = client(server.url)
        deliver(one)
        hung_up.wait(5)

        assert deliver(one) == Sent("m1")
        assert (len(server.received), server.connections) == (2, 2)


def test_a_connection_that_was_idle_for_long_is_not_used_again(monkeypatch):
    """Sooner than a server closes an idle connection, we do: the race between its close and our write is not run."""
    assert IDLE_CONNECTION_SECONDS < 2  # what gunicorn waits; Node waits 5
    monkeypatch.setattr("engagement.transports.client.IDLE_CONNECTION_SECONDS", 0.05)
    with serving(lambda _: Reply(201, {"id": "m1"})) as server:
        one = client(server.url)
        deliver(one)
        time.sleep(0.1)
        deliver(one)

        assert (len(server.received), server.connections) == (2, 2)


def test_a_refused_connection_is_not_sent():
    """Nobody listens: not sent, and everything waits a moment."""
    with loopback.refusing() as url:
        one = client(url)

        assert deliver(one) == NotSent("test: ConnectError")
        assert one.trouble.seconds_paused
        assert one.trouble.is_suspect


def test_a_host_without_an_address_is_not_sent():
    """A name that cannot be resolved: not sent."""
    assert deliver(client("http://gateway.invalid")) == NotSent("test: ConnectError")


def test_a_connection_that_is_not_made_in_time_is_not_sent():
    """A host that does not answer the handshake: not sent."""
    with loopback.never_accepting() as url:
        assert deliver(client(url, connect_within=timedelta(seconds=0.2))) == NotSent("test: ConnectTimeout")


def test_a_certificate_that_is_not_trusted_is_not_sent():
    """TLS comes before the request: with a self-signed certificate nothing is sent; with it as authority, all is."""
    with serving(lambda _: Reply(201, {"id": "m1"}), tls=True) as server:
        assert deliver(client(server.url, verify=True)) == NotSent("test: ConnectError")
        assert server.received == []

        trusting = ssl.create_default_context(cafile=loopback.SELF_SIGNED)
        assert deliver(client(server.url, verify=trusting)) == Sent("m1")


def test_tls_with_a_server_that_speaks_none_is_not_sent():
    """A wrong scheme fails in the TLS handshake: not sent."""
    with serving(lambda _: Reply(201, {"id": "m1"})) as server:
        assert deliver(client(server.url.replace("http:", "https:"))) == NotSent("test: ConnectError")
        assert server.received == []


def test_no_free_place_in_the_pool_is_not_sent():
    """A message that waits in vain for a connection was not written; the one that holds it is in doubt."""
    is_hanging = threading.Event()

    def hang(request):
        is_hanging.set()
        return loopback.hang

    with serving(hang) as server:
        one = client(
            server.url, connections=1, connect_within=timedelta(seconds=0.1), answer_within=timedelta(seconds=0.7)
        )
        outcomes = []
        holder = threading.Thread(target=lambda: outcomes.append(deliver(one)))
        holder.start()
        is_hanging.wait(5)

        assert deliver(one) == NotSent("test: PoolTimeout")
        holder.join(5)
        assert outcomes == [InDoubt("test: ReadTimeout")]
        assert len(server.received) == 1


@pytest.mark.parametrize(
    ("behaviour", "error"),
    [
        (loopback.reset, "ReadError"),
        (loopback.hang_up, "RemoteProtocolError"),
        (loopback.hang, "ReadTimeout"),
        (loopback.saying(b"HTTP/1.1 20", then=loopback.reset), "ReadError"),
        (loopback.saying(b"HTTP/1.1 201 Created\r\nContent-Le"), "RemoteProtocolError"),
        (loopback.saying(b"I am no web server\r\n\r\n"), "RemoteProtocolError"),
        (loopback.saying(b"HTTP/1.1 201 Created\r\nA", then=loopback.hang), "ReadTimeout"),
    ],
)
def test_a_request_without_an_answer_is_in_doubt(behaviour, error):
    """Whatever becomes of a connection after the request was written: in doubt, asked once, and a pause."""
    with serving(lambda _: behaviour) as server:
        one = client(server.url, answer_within=timedelta(seconds=0.3))

        assert deliver(one) == InDoubt(f"test: {error}")
        assert len(server.received) == 1
        assert one.trouble.seconds_paused


def test_a_request_that_is_not_written_in_time_is_in_doubt():
    """A server that stops reading in the middle of a request: what it makes of what arrived is unknown."""
    with serving(lambda _: lambda _: server.is_closing.wait(30)) as server:
        server.reads_bodies = False
        big = Prepared("/messages", b"x" * (32 << 20))

        outcome = client(server.url, answer_within=timedelta(seconds=1)).deliver(outgoing(), big, accepted)

        assert outcome == InDoubt("test: WriteTimeout")


@pytest.mark.parametrize("kind", [ValueError, UnicodeDecodeError, RecursionError, OSError])
def test_an_error_that_is_not_expected_is_in_doubt(kind, monkeypatch):
    """Whatever else the client raises while it sends: it may be after the request was written."""
    with serving(lambda _: Reply(201, {"id": "m1"}, {"Connection": "close"})) as server:
        one = client(server.url)
        next_event = h11.Connection.next_event

        def read_and_fail(self):
            if isinstance(event := next_event(self), h11.Response):
                raise kind("utf-8", b"", 0, 1, "x") if kind is UnicodeDecodeError else kind("x")
            return event

        monkeypatch.setattr(h11.Connection, "next_event", read_and_fail)

        assert deliver(one) == InDoubt(f"test: {'ReadError' if kind is OSError else kind.__name__}")
        assert len(server.received) == 1


def test_an_answer_that_cannot_be_read_is_in_doubt():
    """A mistake of ours or of a host's dialect about an answer must not look like a message that was not sent."""
    with serving(lambda _: Reply(201, {"id": "m1"})) as server:
        outcome = client(server.url).deliver(outgoing(), PREPARED, lambda answer: answer.json["key"]["id"])

    assert outcome == InDoubt("test: the answer could not be read, KeyError")


HEAD = b"HTTP/1.1 %s\r\nContent-Length: 1000\r\nContent-Type: application/json\r\n\r\n"


@pytest.mark.parametrize("then", [loopback.reset, loopback.hang_up, loopback.hang])
def test_half_an_answer_keeps_its_status(then):
    """A body that breaks off takes nothing back: a 422 stays refused, and a 201 is not proof without its words."""
    refused = loopback.saying(HEAD % b"422 Unprocessable", b'{"error":', then=then)
    created = loopback.saying(HEAD % b"201 Created", b'{"id":', then=then)
    with serving(lambda request: refused if len(server.received) == 1 else created) as server:
        one = client(server.url, answer_within=timedelta(seconds=0.3))

        assert deliver(one) == Refused("test: HTTP 422")
        assert deliver(one) == InDoubt("test: HTTP 201")


def test_a_body_that_drips_is_not_waited_for():
    """A body that comes byte by byte is cut at the time for the whole answer, not at the time for each byte."""
    with serving(lambda _: loopback.dripping(HEAD % b"201 Created", server.is_closing)) as server:
        one = client(server.url, answer_within=timedelta(seconds=0.3))
        started = time.monotonic()

        assert deliver(one) == InDoubt("test: HTTP 201")
        assert time.monotonic() - started < 2


def test_a_body_that_is_too_large_is_not_kept():
    """An answer of megabytes is cut, and so is no JSON: nobody's server fills our memory."""
    with serving(lambda _: Reply(201, {"id": "m1", "more": "x" * LARGEST_ANSWER * 4})) as server:
        assert deliver(client(server.url)) == InDoubt("test: HTTP 201")
    with serving(lambda _: Reply(201, {"id": "m1", "more": "x" * (LARGEST_ANSWER - 100)})) as server:
        assert deliver(client(server.url)) == Sent("m1")


@pytest.mark.parametrize("body", ["", "<html>login</html>", '{"id":', "[" * 100_000, b"\xff\xfe\x00", "null"])
def test_a_success_in_other_words_is_in_doubt(body):
    """A 2xx that is not the provider's own proves nothing: a proxy or a login page may have said it."""
    with serving(lambda _: Reply(200, body)) as server:
        assert deliver(client(server.url)) == InDoubt("test: HTTP 200")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(status):
    """The message, and the key with it, go nowhere but to the address that was configured."""
    with serving(lambda _: Reply(201, {"id": "m1"})) as elsewhere:
        with serving(lambda _: Reply(status, "", {"Location": elsewhere.url})) as server:
            outcome = deliver(client(server.url))

        assert isinstance(outcome, InDoubt if status in {302, 303} else Postpone)
        assert elsewhere.received == []


@pytest.mark.parametrize(("headers", "wait"), [({"Retry-After": "7"}, timedelta(seconds=7)), ({}, None)])
def test_too_many_requests_wait_as_long_as_is_asked(headers, wait):
    """A 429 is not sent, with Retry-After or without, and everything else waits too."""
    with serving(lambda _: Reply(429, "", headers)) as server:
        one = client(server.url)

        assert deliver(one) == NotSent("test: HTTP 429", wait)
        assert one.trouble.seconds_paused


@pytest.mark.parametrize("headers", [{"Retry-After": "7"}, {}])
def test_503_is_in_doubt_with_retry_after_too(headers):
    """A proxy whose server hung up in the middle asks to come back too: temporary is not absent."""
    with serving(lambda _: Reply(503, "", headers)) as server:
        one = client(server.url)

        assert deliver(one) == InDoubt("test: HTTP 503")
        assert (one.trouble.seconds_paused > 6) is bool(headers)


@pytest.mark.parametrize("status", [408, 409, 423, 424, 406, 444, 460, 499, 498])
def test_a_proxy_that_tells_that_the_client_left_is_in_doubt(status):
    """The origin may have acted: such a message is neither refused nor sent again by itself."""
    with serving(lambda _: Reply(status)) as server:
        assert deliver(client(server.url)) == InDoubt(f"test: HTTP {status}")


@pytest.mark.parametrize("asked", ["9999999999", "Fri, 31 Dec 9999 23:59:59 GMT"])
@pytest.mark.parametrize("status", [401, 429])
def test_no_far_side_parks_a_message_for_more_than_a_day(status, asked):
    """Whatever it asks for, as `NotSent` or as `Postpone`: after a day it is asked again."""
    with serving(lambda _: Reply(status, "", {"Retry-After": asked})) as server:
        outcome = deliver(client(server.url))

    wait = outcome.retry_after if isinstance(outcome, NotSent) else outcome.until - datetime.now(UTC)
    assert timedelta(hours=23) < wait <= timedelta(days=1)


@pytest.mark.parametrize(("attempt", "minutes"), [(1, 1), (2, 2), (6, 32), (7, 60), (STOPPED_ATTEMPTS, 60)])
def test_a_sender_that_is_not_allowed_costs_the_message_nothing(attempt, minutes):
    """A wrong key postpones the message, longer each time up to an hour, and everything else waits too."""
    with serving(lambda _: Reply(401)) as server:
        one = client(server.url)
        before = datetime.now(UTC)
        outcome = deliver(one, attempt=attempt)

        assert isinstance(outcome, Postpone)
        assert timedelta(0) <= outcome.until - before - timedelta(minutes=minutes) < timedelta(seconds=5)
        assert one.trouble.seconds_paused > 50


def test_a_message_that_a_status_stops_for_ever_ends():
    """After two days a status blames the message, whose words a firewall may refuse; a provider's words never do."""
    with serving(lambda _: Reply(403)) as server:
        assert deliver(client(server.url), attempt=STOPPED_ATTEMPTS + 1) == NotSent("test: HTTP 403")
        known = client(server.url).deliver(
            outgoing(attempt=STOPPED_ATTEMPTS + 1), PREPARED, lambda _: Finding(Proof.STOPPED, "known")
        )
        assert isinstance(known, Postpone)


def test_nothing_is_sent_during_a_pause():
    """What was claimed before the trouble was known is postponed to the end of the pause, and not sent."""
    with serving(lambda _: Reply(201, {"id": "m1"})) as server:
        one = client(server.url)
        one.trouble.note_trouble(timedelta(minutes=5))
        outcome = deliver(one)

        assert isinstance(outcome, Postpone)
        assert outcome.reason == "test: paused after trouble"
        assert timedelta(minutes=4) < outcome.until - datetime.now(UTC) <= timedelta(minutes=5)
        assert server.received == []


def test_pauses_grow_until_a_message_gets_through(monkeypatch):
    """Each trouble doubles the pause up to its limit; the failures of one pause count once; success ends it."""
    now = 1000.0
    monkeypatch.setattr("engagement.transports.trouble.monotonic", lambda: now)
    one = client("http://127.0.0.1:1")
    pauses = []
    for _ in range(12):
        for _ in range(20):
            one.trouble.note_trouble()
        pauses.append(one.trouble.seconds_paused)
        now += one.trouble.seconds_paused

    assert pauses[:5] == [1, 2, 4, 8, 16]
    assert pauses[-1] == LONGEST_PAUSE.total_seconds()
    one.trouble.note_trouble(timedelta(days=300))
    now += LONGEST_PAUSE.total_seconds()
    assert not one.trouble.seconds_paused
    assert one.trouble.is_suspect
    one.trouble.note_answer()
    assert not one.trouble.is_suspect
    one.trouble.note_trouble()
    assert one.trouble.seconds_paused > 900 - 1
    one.trouble.note_success()
    assert not one.trouble.is_suspect
    assert not one.trouble.seconds_paused


@pytest.mark.parametrize(("wait", "slept", "expected"), [(0.0, [], True), (3.5, [3.5], True), (30.0, [], False)])
def test_a_short_pause_is_waited_out(monkeypatch, wait, slept, expected):
    """A cron job's run does not end for a pause of a second; for a longer one it does, and comes again."""
    now, sleeps = 1000.0, []
    monkeypatch.setattr("engagement.transports.trouble.monotonic", lambda: now)
    monkeypatch.setattr("engagement.transports.trouble.sleep", sleeps.append)
    one = client("http://127.0.0.1:1")
    if wait:
        one.trouble.note_trouble(timedelta(seconds=wait))

    assert one.trouble.may_try() is expected
    assert sleeps == slept


def test_a_refusal_ends_all_trouble(monkeypatch):
    """A provider that says no to one message works: the others need not wait."""
    with serving(lambda _: Reply(422)) as server:
        one = client(server.url)
        monkeypatch.setattr("engagement.transports.trouble.FIRST_PAUSE", timedelta(microseconds=1))
        one.trouble.note_trouble()

        assert deliver(one) == Refused("test: HTTP 422")
        assert not one.trouble.is_suspect


def test_a_finding_waits_as_the_answer_says_else_as_it_says_itself():
    """Retry-After comes before the wait that we know of."""
    finding = Finding(Proof.WAIT, "known", timedelta(seconds=9))
    for headers, wait in (({}, 9), ({"Retry-After": "4"}, 4)):
        with serving(lambda _, headers=headers: Reply(400, "", headers)) as server:
            outcome = client(server.url).deliver(outgoing(), PREPARED, lambda _: finding)

        assert outcome == NotSent("known", timedelta(seconds=wait))


def test_twenty_threads_share_a_client():
    """Twenty threads send a hundred messages: each arrives once and gets its own answer."""
    with serving(lambda request: Reply(201, {"id": request.headers["x-number"]})) as server:
        one = client(server.url)
        answers = {}

        def send(thread: int) -> None:
            for number in range(thread, 100, 20):
                prepared = Prepared("/messages", b"{}", {"X-Number": str(number)})
                answers[number] = one.deliver(outgoing(), prepared, accepted)

        threads = [threading.Thread(target=send, args=(thread,)) for thread in range(20)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(20)

        assert answers == {number: Sent(str(number)) for number in range(100)}
        assert sorted(int(request.headers["x-number"]) for request in server.received) == list(range(100))


@pytest.mark.parametrize("url", ["", "ftp://h/", "gateway:8080", "http://", "https://h:port/"])
def test_a_url_that_is_none_is_refused_at_once(url):
    """A wrong URL is a `ValueError` where it is configured, not a failure of each message, and is not repeated."""
    with pytest.raises(ValueError, match=r"^url: must be an http or https URL with a host$"):
        client(url)


@pytest.mark.parametrize("value", ["", " padded", "line\nbreak", "ключ"])
def test_a_key_that_no_header_can_hold_is_refused_at_once(value):
    """Likewise a key: the error names the header, not the key."""
    with pytest.raises(ValueError, match=r"^apikey: must be printable ASCII, without blanks around it$"):
        client("http://127.0.0.1:1", headers={"apikey": value})
