"""A few hundred answers that no server should give, to each transport, checked against what was really taken."""

import gzip
import itertools
import json
import random
import resource
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from queue import Empty, SimpleQueue

import pytest
from gateways import KEY, close_clients, outgoing  # noqa: F401 - autouse
from hostile import HostileServer, Play, answer, bytewise, chunked, endlessly

from engagement import InDoubt, NotSent, Sent
from engagement.transports.cloud import WhatsAppCloud
from engagement.transports.dialects import EVOLUTION, WAHA, WUZAPI
from engagement.transports.gateway import WhatsAppGateway
from engagement.transports.http import Answer, Proof, what_it_proves
from engagement.transports.webhook import Webhook

DEADLINE = 1.5
SLACK = 10.0
"""Seconds more that a crowded machine may take: without a deadline what is endless would end with the test."""
PATIENCE = 30.0
"""The deadline of messages that nobody is hostile to."""
AT_ONCE = 12
FLAT = 48 * 1024  # KiB


def text_of(message) -> str:
    return f"message-{message.id}"


@dataclass(frozen=True)
class Kind:
    """A transport, and how its far side says that it took a message."""

    make: object
    success: int
    said: object
    any_success_is_sent: bool = False
    tls: bool = False

    def body(self, name: str) -> bytes:
        """Return the words of a success."""
        return json.dumps(self.said(f"wamid.{name}")).encode()


def gateway(dialect):
    return lambda url, **options: WhatsAppGateway(url=url, key=KEY, render=text_of, dialect=dialect, **options)


def webhook(url, **options):
    return Webhook(url=f"{url}/hook", render=text_of, **options)


def cloud(url, **options):
    return WhatsAppCloud(phone_number_id="1065", token=KEY, render=text_of, base_url=url, **options)


KINDS = {
    "evolution": Kind(gateway(EVOLUTION), 201, lambda given: {"key": {"id": given}}),
    "waha": Kind(gateway(WAHA), 201, lambda given: {"id": given}),
    "wuzapi": Kind(gateway(WUZAPI), 200, lambda given: {"success": True, "data": {"Id": given}}),
    "cloud": Kind(cloud, 200, lambda given: {"messages": [{"id": given}]}),
    "webhook": Kind(webhook, 200, lambda given: {"provider_message_id": given}, any_success_is_sent=True),
    "webhook-tls": Kind(webhook, 200, lambda given: {"provider_message_id": given}, any_success_is_sent=True, tls=True),
}


@pytest.fixture(params=KINDS)
def kind(request, monkeypatch) -> Kind:
    """A kind of transport that never pauses."""
    monkeypatch.setattr("engagement.transports.trouble.LONGEST_PAUSE", timedelta(0))
    return KINDS[request.param]


def transport_of(kind: Kind, server: HostileServer):
    return kind.make(server.url, verify=False, answer_within=timedelta(seconds=DEADLINE))


class Scenes:
    """Three messages for each play, through a transport of their own, and what was wrong with how they ended."""

    def __init__(self, kind: Kind, server: HostileServer) -> None:
        self.wrong: list[str] = []
        self._kind = kind
        self._server = server
        self._numbers = itertools.count(1)

    def perform(self, plays: SimpleQueue[Play]) -> None:
        """Perform one play after the other, until there are no more."""
        with suppress(Empty):
            while True:
                self._perform(plays.get_nowait())

    def _perform(self, play: Play) -> None:
        transport = transport_of(self._kind, self._server)
        self._send(transport, play)
        assert play.is_endless or play.is_over.wait(20)  # What is left over has been written.
        transport._client._answer_within = PATIENCE  # noqa: SLF001 - on the same connections
        self._send(transport, Play(f"refused after {play.name}", takes=False, pieces=[answer(422, b"{}")]))
        good = answer(self._kind.success, self._kind.body("good"))
        if (outcome := self._send(transport, Play("good", takes=True, pieces=[good]))) != Sent("wamid.good"):
            self.wrong.append(f"taken after {play.name}: {outcome}")
        transport.close()

    def _send(self, transport, play: Play):
        number = next(self._numbers)
        self._server.plays[number] = play
        started, within = time.monotonic(), transport._client._answer_within  # noqa: SLF001
        outcome = transport.send(outgoing(id=number, idempotency_key=f"key{number}"))
        took = time.monotonic() - started
        if isinstance(outcome, NotSent) and not self._server.asked[number] and "ConnectTimeout" in outcome.reason:
            return self._send(transport, play)  # A crowded machine may not even connect in time.
        is_taken = number in self._server.taken
        for is_wrong, what in (
            (isinstance(outcome, Sent) and not is_taken, "but not taken"),
            (not isinstance(outcome, Sent | InDoubt) and is_taken, "but taken"),
            (self._server.asked[number] > 1, "and asked again"),
            (took > within + SLACK, f"after {took:.2f} s"),
        ):
            if is_wrong:
                self.wrong.append(f"{play.name}: {outcome} {what}")
        return outcome


def test_no_answer_is_believed_but_the_one_that_was_asked_for(kind):
    """After each hostile answer one message is refused and one taken: all three end as the ledger says, in time.

    Never `Sent` without having been taken, never unsent but taken, asked once each, within the deadline; no cookie
    comes back, memory stays flat, and hostility to one message puts no other in doubt.
    """
    plays: SimpleQueue[Play] = SimpleQueue()
    for play in hostile_plays(kind):
        plays.put(play)
    how_many = plays.qsize()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with HostileServer(lambda _: Play("probe", takes=False, pieces=[answer(200)]), tls=kind.tls) as server:
        scenes = Scenes(kind, server)
        threads = [threading.Thread(target=scenes.perform, args=(plays,)) for _ in range(AT_ONCE)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(60)

        assert not scenes.wrong, "\n".join(scenes.wrong)
        assert sum(server.asked.values()) == 3 * how_many > 2000
        assert server.cookies == []
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < FLAT


@pytest.mark.parametrize("surplus", ["one", "chunked", "status"])
def test_a_head_with_a_body_says_nothing_of_messages(monkeypatch, surplus):
    """An endpoint that answers HEAD with a body, be it an answer, puts no message in doubt, and is believed nothing."""
    monkeypatch.setattr("engagement.transports.trouble.LONGEST_PAUSE", timedelta(0))
    kind = KINDS["webhook"]
    forged = answer(200, kind.body("forged"))
    pieces = {
        "one": [answer(200, forged)],
        "chunked": [chunked(200, forged)],
        "status": [answer(405, length=len(forged)), forged],
    }
    with HostileServer(lambda _: Play("HEAD", takes=False, pieces=pieces[surplus])) as server:
        for number in range(1, 9, 2):
            transport = transport_of(kind, server)
            server.plays[number] = Play("refused", takes=False, pieces=[answer(422)])
            server.plays[number + 1] = Play("taken", takes=True, pieces=[answer(204)])
            assert transport.ready()
            assert not isinstance(transport.send(outgoing(id=number)), Sent | InDoubt)
            assert transport.send(outgoing(id=number + 1)) == Sent()


def test_a_question_has_a_deadline_too(kind, monkeypatch):
    """`ready` and `look_up` come back from a server that goes on answering for ever."""
    monkeypatch.setattr("engagement.transports.client.PROBE_TIMEOUT", timedelta(seconds=DEADLINE))
    for module in ("cloud", "gateway", "webhook"):
        monkeypatch.setattr(f"engagement.transports.{module}.PROBE_TIMEOUT", timedelta(seconds=DEADLINE))

    def endless(_) -> Play:
        return Play("endless", takes=False, pieces=endlessly(b"HTTP/1.1 102 P\r\n\r\n"), pause=0.03)

    with HostileServer(endless, tls=kind.tls) as server:
        transport = transport_of(kind, server)
        started = time.monotonic()
        assert not transport.ready()
        if getattr(transport, "look_up", None):
            assert transport.look_up(outgoing()) is None
        assert time.monotonic() - started < 2 * DEADLINE + SLACK


# The plays. The far side does not lie: what a status of the table calls unsent was not taken.


def hostile_plays(kind: Kind) -> Iterator[Play]:
    chance = random.Random(18)
    yield from _each_status(kind, chance)
    yield from _left_over(kind)
    yield from _cut(kind, chance)
    yield from _odd(kind)
    yield from _odd_framing(kind)
    yield from _endless(kind)


def _takes(kind: Kind, status: int, chance: random.Random) -> bool:
    if 200 <= status < 300:
        return True if kind.any_success_is_sent else chance.random() < 0.5
    return what_it_proves(Answer(status)) is Proof.IN_DOUBT and chance.random() < 0.5


def _each_status(kind: Kind, chance: random.Random) -> Iterator[Play]:
    for status in range(100, 200):
        then = answer(kind.success, kind.body("late"))
        yield Play(f"{status} before", takes=True, pieces=[b"HTTP/1.1 %d Wait\r\nA: b\r\n\r\n" % status, then])
    for status in range(200, 600):
        body = chance.choice([b"", b"{}", b"<html>", kind.body("said") if status != kind.success else b"null"])
        takes = _takes(kind, status, chance) or (body == kind.body("said") and 200 <= status < 300)
        told = chance.choice([answer(status, body), chunked(status, body), answer(status, body, "Connection: close")])
        yield Play(f"{status}", takes=takes, pieces=[told])


def _left_over(kind: Kind) -> Iterator[Play]:
    """Two answers to one request, and bodies where none may be."""
    good, forged = answer(kind.success, kind.body("own")), answer(kind.success, kind.body("forged"))
    refused = answer(422, b"{}")
    in_chunks = chunked(kind.success, kind.body("own"))
    for own, takes in ((good, True), (refused, False), (in_chunks, True), (answer(500), True), (answer(503), False)):
        for surplus in (forged, forged * 3, b"\r\n", b"x", b"\0" * 40, b"HTTP/1.1", b"HTTP/1.1 100 C\r\n\r\n" + forged):
            for pieces in ([own + surplus], [own, surplus]):
                for pause in (0, 0.005):
                    yield Play(f"{own[9:12]!r} and {surplus[:12]!r} left over", takes, pieces, pause=pause)
    for status in (204, 304):
        for told in (answer(status, forged), chunked(status, forged), b"HTTP/1.1 %d N\r\n\r\n" % status + forged):
            takes = status == 204
            yield Play(f"{status} with a body", takes, [told])
            head, _, body = told.partition(b"\r\n\r\n")
            yield Play(f"{status} with a body that comes later", takes, [head + b"\r\n\r\n", body], pause=0.005)


def _cut(kind: Kind, chance: random.Random) -> Iterator[Play]:
    whole = [
        (answer(kind.success, kind.body("own")), True),
        (chunked(kind.success, kind.body("own")), True),
        (answer(422, b'{"error": "no"}'), False),
        (answer(500, b"{}"), True),
    ]
    for told, takes in whole:
        for end in ("close", "reset"):
            for place in [0, 1, 9, 12, *chance.sample(range(13, len(told)), 6)]:
                yield Play(f"{told[9:12]!r} cut at {place}, {end}", takes, [told[:place]], end)
        for place in (0, 5, 30, len(told) - 1):
            yield Play(f"{told[9:12]!r} cut at {place}, hold", takes, [told[:place]], "hold")


def _odd(kind: Kind) -> Iterator[Play]:
    own = kind.body("own")
    good = answer(kind.success, own)
    for before in (
        b"\r\n",
        b"\r\n\r\n",
        b" ",
        b"x\r\n",
        b"\xff\xfe",
        b"\0",
        b"<html>\r\n\r\n",
        b"HTTP/1.1 1000 X\r\n\r\n",
    ):
        yield Play(f"{before!r} before", takes=True, pieces=[before + good])
    for cookie in ("a=é", "a=b", "a=b; Domain=127.0.0.1; Path=/", "=", "a" * 4000, ";" * 50, "a=\x80\xff"):
        cookies = [f"Set-Cookie: {cookie}"] * 3
        yield Play(f"cookie {cookie[:10]}", takes=True, pieces=[answer(kind.success, own, *cookies)])
    for number in range(60):
        yield Play(
            f"cookie {number}", takes=True, pieces=[answer(kind.success, own, f"Set-Cookie: n{number}={'v' * 900}")]
        )
    bomb = gzip.compress(bytes(30 << 20))
    for encoding, body in (("gzip", gzip.compress(own)), ("gzip", bomb), ("gzip", b"x"), ("br", own), ("é", own)):
        yield Play(f"{encoding}", takes=True, pieces=[answer(kind.success, body, f"Content-Encoding: {encoding}")])
    for header in (
        "Content-Length: 5",
        "Transfer-Encoding: chunked",
        "Transfer-Encoding: gzip, chunked",
        "A b: c",
        " x",
        ":",
    ):
        yield Play(f"with {header}", takes=True, pieces=[answer(kind.success, own, header)])
    for place in ("/", "http://127.0.0.1:1/", "//[", "\xff"):
        for status in (301, 302, 303, 307, 308):
            yield Play(f"{status} to {place!r}", takes=False, pieces=[answer(status, b"", f"Location: {place}")])


def _odd_framing(kind: Kind) -> Iterator[Play]:
    own = kind.body("own")
    good = answer(kind.success, own)
    for head in (
        b"HTTP/1.0 %d A",
        b"HTTP/2 %d A",
        b"HTTP/1.1 %d",
        b"http/1.1 %d A",
        b"HTTP/1.1  %d A",
        b"HTTP/9.9 %d A",
    ):
        told = head % kind.success + b"\r\nContent-Length: %d\r\n\r\n" % len(own) + own
        yield Play(f"{head!r}", takes=True, pieces=[told])
    for length in ("-1", "+5", "1e3", "99999999999999999999999", "0x10", "", "٣"):
        told = f"HTTP/1.1 {kind.success} A\r\nContent-Length: {length}\r\n\r\n".encode() + own
        yield Play(f"length {length}", takes=True, pieces=[told], end="close")
    for size in (b"-1", b"g", b"", b"ffffffffffffffffffff", b" 5", b"5 ", b"5;" + b"x" * 70_000):
        told = b"HTTP/1.1 %d A\r\nTransfer-Encoding: chunked\r\n\r\n" % kind.success + size + b"\r\n" + own
        yield Play(f"chunk {size[:20]!r}", takes=True, pieces=[told], end="close")
    yield Play("a reason of 60,000", takes=True, pieces=[answer(kind.success, own, reason="x" * 60_000)])
    yield Play("100,000 headers", takes=True, pieces=[answer(kind.success, own, *["A: b"] * 100_000)])
    yield Play("bytewise", takes=True, pieces=bytewise(good), pause=0.0001)
    yield Play("bytewise in chunks", takes=True, pieces=[chunked(kind.success, *bytewise(own))])
    yield Play(
        "a large trailer", takes=True, pieces=[chunked(kind.success, own, trailer=b"A: " + b"b" * 90_000 + b"\r\n")]
    )


def _endless(kind: Kind) -> Iterator[Play]:
    in_chunks = b"HTTP/1.1 %d A\r\nTransfer-Encoding: chunked\r\n\r\n" % kind.success
    large = b"y" * 60_000
    for name, first, more, flood in (
        ("1xx", b"", b"HTTP/1.1 102 P\r\n\r\n", b"HTTP/1.1 102 P\r\n\r\n" * 3000),
        ("status line", b"HTTP/1.1 ", b"2", large),
        ("reason", b"HTTP/1.1 200 ", b"x", large),
        ("header", b"HTTP/1.1 200 A\r\nB: ", b"x", large),
        ("headers", b"HTTP/1.1 200 A\r\n", b"B: c\r\n", b"B: c\r\n" * 9000),
        ("chunk size", in_chunks, b"0", b"0" * 60_000),
        ("chunk extension", in_chunks + b"1;", b"x", large),
        ("chunks", in_chunks, b"1\r\nx\r\n", b"1\r\nx\r\n" * 9000),
        ("body", answer(kind.success, length=1 << 40), b"x", large),
        ("body to the end", b"HTTP/1.1 %d A\r\n\r\n" % kind.success, b"x", large),
        ("trailer", in_chunks + b"0\r\nA: ", b"x", large),
        ("trailers", in_chunks + b"0\r\n", b"A: b\r\n", b"A: b\r\n" * 9000),
        ("nothing", b"", b"\r\n", b"\r\n" * 30_000),
    ):
        yield Play(
            f"endless {name}, dripping", takes=True, pieces=endlessly(more, first=first), pause=0.02, is_endless=True
        )
        yield Play(f"endless {name}", takes=True, pieces=endlessly(flood, first=first), is_endless=True)
