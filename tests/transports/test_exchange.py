"""One exchange: what is shared, what is not, and how long it may take."""

import contextlib
import os
import signal
import socket
import ssl
import subprocess
import sys
import threading
import time
from datetime import timedelta

import loopback
import pytest
from exchanges import A_MINUTE, SOON, client, deliver
from gateways import close_clients, outgoing  # noqa: F401 - autouse
from loopback import Reply, serving

from engagement import InDoubt, NotSent, Postpone, Sent
from engagement.transports.client import Prepared
from engagement.transports.http import ReadTimeout, Silence
from engagement.transports.waiting import Waiter, the_waiter
from engagement.transports.webhook import Webhook

IN_TIME = 8
"""Seconds that a crowded machine may take; without a deadline it would be much longer."""


def test_no_cookie_is_kept():
    """What a far side sets is not sent back: one person's cookie would go with the next one's message."""
    with serving(lambda _: Reply(201, "1", {"Set-Cookie": "a=é; Path=/"})) as server:
        one = client(server.url)
        for _ in range(3):
            assert deliver(one) == Sent("1")
        assert not [request for request in server.received if "cookie" in request.headers]


@pytest.mark.parametrize("header", ["line\nbreak", "n\0l", "ключ", "a: b\r\nc: d"])
def test_a_request_that_http_does_not_have_costs_no_retry(header):
    """It is the host's mistake, for every message alike: postponed, and nothing is written."""
    with serving(lambda _: Reply(201, "1")) as server:
        outcome = deliver(client(server.url), Prepared("/messages", b"{}", {"X-Key": header}))

        assert isinstance(outcome, Postpone)
        assert outcome.reason == "test: UnsendableRequest"
        assert not server.connections


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
        one = client(f"https://127.0.0.1:{silent.getsockname()[1]}", connect_within=SOON)
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
    started = time.monotonic()

    assert deliver(client("http://gateway.example", connect_within=SOON)) == NotSent("test: ConnectTimeout")
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


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # what is tested here
def test_a_child_process_shares_nothing_with_its_parent():
    """After a fork, also in the middle of a send and of a lock, the child sends over connections of its own."""
    is_held, goes_on = threading.Event(), threading.Event()

    def hold(request):
        if "x-hold" in request.headers:
            is_held.set()
            goes_on.wait(10)
        return Reply(201, "1")

    with serving(hold) as server:
        one = client(server.url, connections=1)
        deliver(one)
        thread = threading.Thread(target=deliver, args=(one, Prepared("/messages", b"{}", {"X-Hold": "1"})))
        deliver(one)
        thread.start()
        is_held.wait(5)
        one.trouble._lock.acquire()  # noqa: SLF001 - another thread could hold it just now
        child = os.fork()
        if not child:
            outcomes = [deliver(one), deliver(one)]
            os._exit(0 if outcomes == [Sent("1"), Sent("1")] else 1)
        one.trouble._lock.release()  # noqa: SLF001
        assert os.waitpid(child, 0)[1] == 0
        goes_on.set()
        thread.join(5)
        assert [deliver(one), deliver(one)] == [Sent("1"), Sent("1")]
        assert len(server.received) == 7


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # what is tested here
def test_an_idle_connection_stays_the_parents():
    """Two processes on one connection would read each other's answers."""
    with serving(lambda _: Reply(201, "1")) as server:
        one = client(server.url)
        deliver(one)
        child = os.fork()
        if not child:
            os._exit(0 if deliver(one) == Sent("1") else 1)
        assert os.waitpid(child, 0)[1] == 0
        assert deliver(one) == Sent("1")
        assert (len(server.received), server.connections) == (3, 2)


@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork:DeprecationWarning")  # what is tested here
@pytest.mark.parametrize("is_idle", [True, False])
def test_a_child_process_keeps_nothing_of_its_parent_open(is_idle):
    """A connection that the parent has closed is closed, while the child lives on."""
    has_ended = threading.Event()

    def answer_and_wait(connection):
        if is_idle:
            connection.sendall(Reply(201, "1").encode())
        is_there.set()
        if connection.recv(1) == b"":
            has_ended.set()

    is_there = threading.Event()
    with serving(lambda _: answer_and_wait) as server:
        one = client(server.url, answer_within=timedelta(seconds=1))
        thread = threading.Thread(target=deliver, args=(one,))
        thread.start()
        is_there.wait(5)
        if is_idle:
            thread.join(5)
        lives, ends = os.pipe()
        child = os.fork()
        if not child:
            os.close(ends)
            os.read(lives, 1)
            os._exit(0)
        thread.join(5)
        one.close()
        assert has_ended.wait(5)
        os.close(lives)
        os.close(ends)
        assert os.waitpid(child, 0)[1] == 0


def test_all_clients_of_a_process_share_one_thread():
    """Memory and threads do not grow with the transports that a host makes."""
    with serving(lambda _: Reply(201, "1")) as server:
        assert [deliver(client(server.url)) for _ in range(3)] == [Sent("1")] * 3
    assert [thread.name for thread in threading.enumerate()].count("engagement-exchanges") == 1


def test_a_closed_connection_does_not_wait_for_the_next_message():
    """What the far side has ended, or written unasked, is closed at once, and not when somebody comes by."""
    ended = []

    def answer_and(connection):
        connection.sendall(Reply(201, "1").encode())
        time.sleep(0.2)
        connection.sendall(b"x")
        ended.append(connection.recv(1))
        has_ended.set()

    has_ended = threading.Event()
    with serving(lambda _: answer_and) as server:
        one = client(server.url)
        deliver(one)
        assert has_ended.wait(5)
        assert ended == [b""]
        server.behave = lambda _: Reply(201, "1")
        deliver(one)
        deliver(one)
        assert server.connections == 3  # All are distrusted.


def test_a_caller_that_is_interrupted_leaves_nothing_behind():
    """Ctrl-C ends the exchange that it comes into, whose answer nobody reads, and none of another."""
    has_ended = threading.Event()

    def hang(connection):
        if connection.recv(1) == b"":
            has_ended.set()

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    try:
        with serving(lambda _: hang) as server:
            one = client(server.url, connections=1, answer_within=A_MINUTE)
            signal.setitimer(signal.ITIMER_REAL, 0.3)
            with pytest.raises(KeyboardInterrupt):
                deliver(one)
            assert has_ended.wait(5)
            server.behave = lambda _: Reply(201, "1")
            assert [deliver(one), deliver(one)] == [Sent("1"), Sent("1")]
            assert server.connections == 2
    finally:
        signal.signal(signal.SIGALRM, before)


@pytest.mark.parametrize(
    ("stuck", "outcome"), [(5, NotSent("test: ConnectTimeout")), (0, InDoubt("test: ReadTimeout"))]
)
def test_what_could_not_begin_in_time_does_not_begin(stuck, outcome, monkeypatch):
    """A thread that is held up writes nothing later; if it does not even say so, the caller comes back, in doubt."""
    monkeypatch.setattr("engagement.transports.waiting.STUCK_SECONDS", stuck)
    goes_on = threading.Event()
    with serving(lambda _: Reply(201, "1")) as server:
        one = client(server.url, answer_within=SOON)
        the_waiter().soon(lambda _: goes_on.wait(10), None)
        threading.Timer(0.6, goes_on.set).start()
        started = time.monotonic()

        assert deliver(one) == outcome
        assert time.monotonic() - started < IN_TIME
        goes_on.wait(10)
        deliver(client(server.url))
        assert len(server.received) == 1


def test_a_thread_that_fails_takes_no_exchange_with_it_for_ever(monkeypatch):
    """What it was waiting for is in doubt at once, and the next exchange has a new one."""
    is_there, fails = threading.Event(), threading.Event()
    turn = Waiter._turn  # noqa: SLF001

    def fail(self):
        turn(self)
        if fails.is_set():
            fails.clear()
            raise OSError

    monkeypatch.setattr(Waiter, "_turn", fail)

    def answer(request):
        is_there.set()
        return loopback.hang if "x-hang" in request.headers else Reply(201, "1")

    with serving(answer) as server:
        outcomes = []
        one = client(server.url, answer_within=A_MINUTE)
        deliver(one)
        is_there.clear()
        hanging = Prepared("/messages", b"{}", {"X-Hang": "1"})
        thread = threading.Thread(target=lambda: outcomes.append(deliver(one, hanging)))
        thread.start()
        is_there.wait(5)
        fails.set()
        the_waiter().soon(lambda _: None, None)
        thread.join(5)
        assert outcomes == [InDoubt("test: ReadError")]
        two = client(server.url)
        assert [deliver(two), deliver(two)] == [Sent("1")] * 2


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
