"""One exchange: what is shared, what is not, and how long it may take."""

import contextlib
import socket
import ssl
import subprocess
import sys
import threading
import time
from datetime import timedelta

import loopback
import pytest
from exchanges import A_MINUTE, IN_TIME, SOON, client, deliver
from gateways import close_clients, outgoing  # noqa: F401 - autouse
from loopback import Reply, serving

from engagement import InDoubt, NotSent, Postpone, Sent
from engagement.transports.client import Prepared
from engagement.transports.http import ReadTimeout, Silence
from engagement.transports.webhook import Webhook


def test_no_cookie_is_kept():
    """What a far side sets is not sent back: one person's cookie would go with the next one's message."""
    with serving(lambda _: Reply(201, "1", {"Set-Cookie": "a=é; Path=/"})) as server:
        one = client(server.url)
        for _ in range(3):
            assert deliver(one) == Sent("1")
        assert not [request for request in server.received if "cookie" in request.headers]


@pytest.mark.parametrize(
    "header",
    [
        {"X-Key": "line\nbreak"},
        {"X-Key": "n\0l"},
        {"X-Key": "ключ"},
        {"X-Key": "a: b\r\nc: d"},
        {"X Key": "a"},
        {"X-Key\r\nX": "a"},
        {"ключ": "a"},
        {"Content-Length": "1"},
        {"transfer-encoding": "chunked"},
        {"Connection": "keep-alive"},
        {"Host": "other.example"},
    ],
)
def test_a_request_that_http_does_not_have_costs_no_retry(header):
    """It is the host's mistake, for every message alike: postponed, and nothing is written."""
    with serving(lambda _: Reply(201, "1")) as server:
        outcome = deliver(client(server.url), Prepared("/messages", b"{}", header))

        assert isinstance(outcome, Postpone)
        assert outcome.reason == "test: UnsendableRequest"
        assert not server.connections
        with pytest.raises(ValueError, match=r"headers: |X-Key: "):
            client(server.url, headers=header)


@pytest.mark.parametrize("scheme", ["http", "https"])
def test_a_connection_on_which_something_came_is_not_used_again(scheme):
    """A second answer to one message is not the answer to the next one, and no connection is used twice after it."""

    def twice(connection):
        connection.sendall(Reply(201, "own").encode() + Reply(201, "forged").encode())
        assert connection.recv(1) == b""  # It is closed, and no other request comes on it.

    with serving(lambda _: twice, tls=scheme == "https") as server:
        one = client(server.url)
        for _ in range(3):
            assert deliver(one) == Sent("own")
        server.behave = lambda _: Reply(201, "own")
        for _ in range(3):
            assert deliver(one) == Sent("own")

        assert (len(server.received), server.connections) == (6, 6)


@pytest.mark.parametrize("part", [b"\x17", b"\x17\x03\x03\x00\x40", b"\x17\x03\x03\x00\x40" + b"x" * 63])
def test_half_a_record_of_tls_is_something_that_came(part):
    """The rest of a second answer would come after the next request, and pass for its answer."""
    is_written, has_ended = threading.Event(), threading.Event()

    def answer_and_begin_another(connection):
        connection.sendall(Reply(201, "own").encode())
        time.sleep(0.05)
        socket.socket.sendall(connection, part)  # past TLS
        is_written.set()
        assert connection.recv(1) == b""
        has_ended.set()

    with serving(lambda _: answer_and_begin_another, tls=True) as server:
        one = client(server.url)
        assert deliver(one) == Sent("own")
        assert is_written.wait(5)
        server.behave = lambda _: Reply(201, "own")
        assert [deliver(one) for _ in range(3)] == [Sent("own")] * 3
        assert has_ended.wait(5)
        assert server.connections == 4  # All are distrusted.


@pytest.mark.parametrize("greeting", [Reply(201, "forged").encode(), b"SSH-2.0-OpenSSH_9.9\r\n", b"\0"])
def test_what_speaks_first_is_not_written_to(greeting, monkeypatch):
    """An answer that comes before the question is none: nothing is sent to who gives it."""
    monkeypatch.setattr("engagement.transports.connection.SETTLING_SECONDS", 0.5)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        heard = []

        def greet():
            connection, _ = listener.accept()
            with connection:
                connection.sendall(greeting)
                with contextlib.suppress(ConnectionError):
                    heard.append(connection.recv(1))

        thread = threading.Thread(target=greet)
        thread.start()
        assert deliver(client(f"http://127.0.0.1:{listener.getsockname()[1]}")) == NotSent("test: ConnectError")
        thread.join(5)
        assert not any(heard)


@pytest.mark.parametrize("idle_for", [0.3, 1.7])
def test_what_comes_on_an_idle_connection_is_a_reason_to_distrust_all(idle_for):
    """Also if it had been idle for too long to be used again: the next surplus may come when it can not be told."""

    def late(connection):
        connection.sendall(Reply(201, "own").encode())
        time.sleep(0.1)
        connection.sendall(Reply(201, "forged").encode())

    with serving(lambda _: late) as server:
        one = client(server.url)
        assert deliver(one) == Sent("own")
        time.sleep(idle_for)
        server.behave = lambda _: Reply(201, "own")
        assert [deliver(one) for _ in range(3)] == [Sent("own")] * 3
        assert server.connections == 4


@pytest.mark.skipif(sys.platform != "linux", reason="no other system can be asked to acknowledge at once")
def test_what_waits_for_our_acknowledgement_does_not_come_with_the_next_answer():
    """A second small write is held back until the first is acknowledged: else ours does that with the next request."""
    is_written = threading.Event()

    def answer_all_and_one_twice(connection):
        for _ in range(8):  # Until our system expects that a request follows each answer, and saves itself the rest.
            connection.sendall(Reply(201, "own").encode())
            connection.recv(65_536)
        connection.sendall(Reply(201, "own").encode())
        connection.sendall(Reply(201, "forged").encode())
        is_written.set()
        connection.recv(1)

    with serving(lambda _: answer_all_and_one_twice) as server:
        one = client(server.url)
        assert {deliver(one) for _ in range(9)} == {Sent("own")}
        assert is_written.wait(5)
        time.sleep(0.005)  # of the 40 ms that our system would wait
        server.behave = lambda _: Reply(201, "next")
        assert deliver(one) == Sent("next")


def test_a_surplus_is_a_reason_to_distrust_those_that_are_idle_already():
    """Who writes more than it was asked on one connection may have done so on the others, and it is not there yet."""
    both, says_more, has_ended = threading.Barrier(2), threading.Event(), threading.Event()

    def answer_and_say_more(connection):
        both.wait(5)
        connection.sendall(Reply(201, "own").encode())
        says_more.wait(5)
        if connection is server_side[1]:
            connection.sendall(b"x")
            connection.recv(1)
            has_ended.set()
        connection.recv(1)

    server_side = []

    def remember(connection):
        server_side.append(connection)
        answer_and_say_more(connection)

    with serving(lambda _: remember) as server:
        one = client(server.url)
        threads = [threading.Thread(target=deliver, args=(one,)) for _ in range(2)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(5)
        says_more.set()
        assert has_ended.wait(5)
        server.behave = lambda _: Reply(201, "own")
        assert deliver(one) == Sent("own")
        assert server.connections == 3


@pytest.mark.parametrize(
    "head",
    [
        b"HTTP/1.1 204 No Content\r\nContent-Length: 40\r\n\r\n",
        b"HTTP/1.1 304 Same\r\nTransfer-Encoding: chunked\r\n\r\n",
        b"HTTP/1.1 201 Said\r\nContent-Length: 0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    ],
)
def test_a_body_that_is_claimed_may_still_come(head):
    """Where an answer says that there is more than it may have, the next message has a connection of its own."""

    def answer_and_go_on(connection):
        connection.sendall(head)
        if connection.recv(65_536):  # The next request would be answered by what was claimed.
            connection.sendall(Reply(201, "forged").encode())

    with serving(lambda _: answer_and_go_on) as server:
        one = client(server.url)
        deliver(one)
        server.behave = lambda _: Reply(201, "own")
        assert deliver(one) == Sent("own")
        assert server.connections == 2


def test_a_head_has_a_connection_of_its_own():
    """Some servers send a body nevertheless, and some of them not at once."""
    with serving(lambda _: Reply(200)) as server:
        one = client(server.url)
        one.request("HEAD", "")
        assert server.received[0].headers["connection"] == "close"
        one.request("HEAD", "")
        deliver(one)
        assert server.connections == 3


@pytest.mark.parametrize("answer", [b"HTTP/1.1 103 Early\r\n\r\n" * 200, b"HTTP/1.1 201 Said\r\nX: " + b"x" * 100_000])
def test_an_answer_that_is_announced_without_end_is_none(answer):
    """Interim answers and heads have a bound: an answer behind more than that is not waited for."""
    with serving(lambda _: loopback.saying(answer + Reply(201, "1").encode(), then=loopback.hang)) as server:
        assert deliver(client(server.url)) == InDoubt("test: RemoteProtocolError")


def test_a_success_for_half_a_request_is_in_doubt():
    """Who has not read it has not taken it, and nobody knows what else it has done."""

    def answer_early(connection):
        connection.sendall(Reply(201, "early").encode())
        connection.shutdown(socket.SHUT_WR)
        time.sleep(0.3)
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")

    with serving(lambda _: answer_early) as server:
        server.reads_bodies = False
        assert isinstance(deliver(client(server.url), Prepared("/messages", b"x" * (32 << 20))), InDoubt)


def test_a_connection_is_used_again_over_tls():
    """What TLS says for itself on an idle connection, such as session tickets, is nobody's answer."""
    with serving(lambda _: Reply(201, "1"), tls=True) as server:
        one = client(server.url, verify=ssl.create_default_context(cafile=loopback.SELF_SIGNED))
        for _ in range(5):
            assert deliver(one) == Sent("1")
        assert (len(server.received), server.connections) == (5, 1)


@pytest.mark.parametrize("length", [b"", b"Content-Length: 0\r\n"])
def test_a_204_keeps_its_connection(length):
    """An endpoint that answers without a body costs no connection for each message."""

    def answer_all(connection):
        for _ in range(3):
            connection.sendall(b"HTTP/1.1 204 No Content\r\n" + length + b"\r\n")
            connection.recv(65_536)

    with serving(lambda _: answer_all) as server:
        one = Webhook(url=server.url)
        assert [one.send(outgoing()), one.send(outgoing()), one.send(outgoing())] == [Sent(), Sent(), Sent()]
        assert server.connections == 1


def test_what_answers_nothing_to_tls_is_given_up_in_time():
    """The handshake is part of the time for a connection: nothing was written."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        one = client(f"https://127.0.0.1:{silent.getsockname()[1]}", answer_within=A_MINUTE, connect_within=SOON)
        started = time.monotonic()

        assert deliver(one) == NotSent("test: ConnectTimeout")
        assert time.monotonic() - started < IN_TIME


def test_what_answers_nothing_to_tls_is_given_up_when_the_exchange_is():
    """The time for all of an exchange holds while it connects, too."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        one = client(f"https://127.0.0.1:{silent.getsockname()[1]}", answer_within=SOON, connect_within=A_MINUTE)
        started = time.monotonic()

        assert deliver(one) == NotSent("test: ConnectTimeout")
        assert time.monotonic() - started < IN_TIME


def test_a_request_may_have_less_time_than_others():
    """`within` bounds a probe, whatever a send may take."""
    with serving(lambda _: loopback.hang) as server:
        started = time.monotonic()

        assert client(server.url, answer_within=A_MINUTE).request("GET", "/", within=SOON) == Silence(ReadTimeout)
        assert time.monotonic() - started < IN_TIME


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"answer_within": timedelta(0)}, "answer_within"),
        ({"answer_within": timedelta(days=25)}, "answer_within"),
        ({"connect_within": timedelta.max}, "connect_within"),
        ({"connections": 0}, "connections"),
        ({"verify": None}, "verify"),
        ({"verify": ""}, "verify"),
        ({"verify": 0}, "verify"),
    ],
)
def test_what_no_exchange_can_keep_is_refused_at_once(options, name):
    """Longer than a system waits, a place for nobody, and a check of certificates that nobody meant to switch off."""
    with pytest.raises((ValueError, TypeError), match=f"^{name}: "):
        client("https://gateway.example", **options)


def test_a_silent_name_server_is_given_up_in_time(monkeypatch):
    """Nothing but a thread can bound a name server's silence."""
    is_over = threading.Event()
    look_up = socket.getaddrinfo

    def hang(host, *arguments, **options):
        if host == "gateway.example" and not options.get("flags"):
            is_over.wait(30)
        return look_up(host, *arguments, **options)

    monkeypatch.setattr(socket, "getaddrinfo", hang)
    one = client("http://gateway.example", answer_within=A_MINUTE, connect_within=SOON)
    started = time.monotonic()

    assert deliver(one) == NotSent("test: ConnectTimeout")
    assert time.monotonic() - started < IN_TIME
    is_over.set()


def test_an_answer_that_drips_is_in_doubt_in_time():
    """A head that comes byte by byte is cut at the deadline, not at a time for each byte."""
    with serving(lambda _: loopback.dripping(b"HTTP/1.1 201", server.is_closing)) as server:
        started = time.monotonic()

        assert deliver(client(server.url, answer_within=SOON)) == InDoubt("test: ReadTimeout")
        assert time.monotonic() - started < IN_TIME


def test_who_hangs_up_before_it_has_read_all_may_say_why():
    """A server that refuses a request for its size, and does not read on, is heard."""

    def refuse(connection):
        connection.sendall(Reply(413).encode())
        connection.shutdown(socket.SHUT_RDWR)

    with serving(lambda _: refuse) as server:
        server.reads_bodies = False
        outcome = deliver(client(server.url), Prepared("/messages", b"x" * (8 << 20)))

    # Its reset may overtake what it said.
    assert outcome in [InDoubt("test: ReadError"), InDoubt("test: RemoteProtocolError")] or outcome.reason.endswith(
        "413"
    )


def test_what_gets_through_ends_the_trouble():
    """After a message that was sent, the next trouble is a first one again."""
    replies = [Reply(500), Reply(201, "1"), Reply(500)]
    with serving(lambda _: replies.pop(0)) as server:
        one = client(server.url)
        pauses = []
        for _ in range(3):
            deliver(one)
            pauses.append(one.trouble.seconds_paused)

    assert [round(pause) for pause in pauses] == [1, 0, 1]


def test_a_closed_transport_leaves_nothing_open_and_still_sends():
    """What is in use is closed after it; what is sent later has a connection for itself."""
    with serving(lambda _: Reply(201, "1")) as server:
        one = client(server.url)
        deliver(one)
        one.close()
        one.close()
        assert [deliver(one), deliver(one)] == [Sent("1"), Sent("1")]
        assert server.connections == 3


def test_a_process_ends_without_a_warning():
    """Also one that never closes its transports, be it in the middle of a send."""
    program = """
import sys, threading
from datetime import datetime, UTC
from engagement.transports.client import Prepared, ProviderClient
made = [ProviderClient("test", sys.argv[1], headers={}, answer_within=__import__("datetime").timedelta(seconds=5))
        for _ in range(3)]
for one in made:
    print(one.request("POST", "/", b"{}").status)
del made[0]
threading.Thread(target=made[0].request, args=("POST", "/hang", b"{}"), daemon=True).start()
"""
    with serving(lambda request: loopback.hang if request.path == "/hang" else Reply(201)) as server:
        command = [sys.executable, "-W", "error", "-X", "dev", "-c", program, server.url]
        ran = subprocess.run(command, capture_output=True, text=True, timeout=30, check=False)

    assert (ran.returncode, ran.stdout, ran.stderr) == (0, "201\n" * 3, "")


@pytest.mark.parametrize(
    ("base", "path", "target"),
    [
        ("", "/messages", "/messages"),
        ("/", "/messages", "/messages"),
        ("/v1/", "/messages?a=b", "/v1/messages?a=b"),
        ("/a b/é", "/x%2Fy", "/a%20b/%C3%A9/x%2Fy"),
        ("", "", "/"),
        ("?a=b", "", "/?a=b"),
        ("/hook?a=%C3%A9&b=é#f", "", "/hook?a=%C3%A9&b=%C3%A9"),
    ],
)
def test_addresses(base, path, target):
    """A path comes after that of the URL; none is the URL itself. What is quoted stays so."""
    with serving(lambda _: Reply(201, "1")) as server:
        deliver(client(server.url + base), Prepared(path, b"{}"))
        assert server.received[0].path == target
        assert server.received[0].headers["host"] == server.url.removeprefix("http://")


def test_a_user_in_the_address_is_told_to_the_server():
    """As basic authentication, unless the host gave an authorization of its own."""
    with serving(lambda _: Reply(201, "1")) as server:
        url = server.url.replace("://", "://user:pass%21@")
        deliver(client(url))
        deliver(client(url, headers={"authorization": "Bearer x"}))

    assert [request.headers["authorization"] for request in server.received] == ["Basic dXNlcjpwYXNzIQ==", "Bearer x"]
    assert not [request for request in server.received if "@" in request.headers["host"]]
