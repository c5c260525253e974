"""The answers that are read without h11 are those that h11 would have read, to the byte."""

import h11
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from engagement.transports.connection import asked_with, usual_answer
from engagement.transports.http import Answer

NODE = b"""HTTP/1.1 201 Created\r
X-Powered-By: Express\r
Content-Type: application/json; charset=utf-8\r
Content-Length: 7\r
ETag: W/"10-abc"\r
Date: Sun, 29 Nov 2026 12:00:00 GMT\r
Connection: keep-alive\r
Keep-Alive: timeout=5\r
\r
{"a":1}"""


def by_h11(data: bytes) -> Answer:
    """Return the whole answer; raise `AssertionError` if the connection could not be used again after it."""
    wire = h11.Connection(h11.CLIENT)
    wire.send(asked_with("POST"))
    wire.send(h11.EndOfMessage())
    wire.receive_data(data)
    head, body = wire.next_event(), b""
    assert type(head) is h11.Response
    while type(event := wire.next_event()) is h11.Data:
        body += bytes(event.data)
    assert type(event) is h11.EndOfMessage
    assert (wire.our_state, wire.their_state, wire.trailing_data) == (h11.DONE, h11.DONE, (b"", False))
    headers = [(name.decode(), value.decode()) for name, value in head.headers]
    assert len(dict(headers)) == len(headers)
    return Answer(head.status_code, dict(headers), body)


BREAKS = st.sampled_from([b"\r\n"] * 12 + [b"\n", b"\r", b"\r\n ", b"\r\n\r\n"])
LINES = st.sampled_from(
    [
        b"Content-Type: application/json",
        b"X-A:b",
        b"X-A: b",
        b"x-a: c ",
        b"X-B:  d",
        b"X-C: e\tf",
        b"X-D:",
        b"X-E: \xc3\xa9",
        b"X F: g",
        b"X-G: h\0",
        b"Content-Length: 5",
        b"content-length: 05",
        b"Content-Length: +5",
        b"Content-Length: 5, 5",
        b"Transfer-Encoding: chunked",
        b"transfer-encoding: identity",
        b"Connection: close",
        b"connection: Keep-Alive",
        b"Connection: keep-alive, close",
        b"Upgrade: h2c",
        b"Set-Cookie: a=b; c=d",
    ]
)
FIRST = st.sampled_from(
    [b"HTTP/1.1 200 OK"] * 6
    + [b"HTTP/1.1 %d Said" % status for status in (100, 101, 199, 201, 204, 304, 307, 422, 500, 599, 600)]
    + [
        b"HTTP/1.0 200 OK",
        b"HTTP/1.1 200",
        b"HTTP/1.1 200 ",
        b"HTTP/1.1  200 OK",
        b"http/1.1 200 OK",
        b"HTTP/1.1 2000 A",
    ]
)


@st.composite
def answers(draw) -> bytes:
    """Almost usual ones: with the right length or none, and with one byte changed, or surplus, now and then."""
    body = draw(st.sampled_from([b"", b"{}", b"12345", b"\r\n", b"0\r\n\r\n"]))
    lines = [draw(FIRST), *draw(st.lists(LINES, max_size=4))]
    if draw(st.integers(0, 9)):
        lines.insert(draw(st.integers(1, len(lines))), b"Content-Length: %d" % len(body))
    data = b"".join(line + draw(BREAKS) for line in lines) + b"\r\n" + body
    if draw(st.integers(0, 3)) == 0:
        place = draw(st.integers(0, len(data) - 1))
        data = data[:place] + draw(st.binary(max_size=2)) + data[place + draw(st.integers(0, 1)) :]
    return data + draw(st.sampled_from([b""] * 6 + [b"\r\n", b"HTTP/1.1 200 OK\r\n\r\n"]))


@given(answers())
@settings(max_examples=1000, deadline=None)
def test_what_is_read_without_h11_is_what_h11_reads(data):
    """Whatever is taken, h11 takes too, for the same answer, whole, with nothing behind it."""
    answer = usual_answer(data)
    assert answer is None or answer == by_h11(data)


@pytest.mark.parametrize("data", [NODE, b"HTTP/1.1 422 \r\nContent-Length: 0\r\n\r\n"])
def test_usual_answers_are_read_without_h11(data):
    """What Node's servers say costs a tenth; with a byte more or less it is h11's."""
    assert usual_answer(data) == by_h11(data)
    assert [usual_answer(data[:place]) for place in range(len(data))] == [None] * len(data)
    assert usual_answer(data + b"x") is None


@pytest.mark.parametrize(
    "line",
    [
        b"Transfer-Encoding: chunked",
        b"Connection: close",
        b"Content-Length: 7",
        b"ETag: again",
        b" continued",
        b"X:y",
        b"X: \xe9",
    ],
)
def test_an_answer_with_one_unusual_line_is_read_by_h11(line):
    """Whatever else it says: h11 knows what that means."""
    assert usual_answer(NODE.replace(b"\r\n\r\n", b"\r\n" + line + b"\r\n\r\n")) is None


@pytest.mark.parametrize("data", [b"HTTP/1.1 200 " + b" " * 60_000, b"HTTP/1.1 200 A\r\n" + b"A: b c \r\n" * 8_000])
def test_an_unusual_answer_is_seen_in_no_time(data):
    """The time grows with the length, and no faster."""
    from time import perf_counter

    started = perf_counter()
    assert usual_answer(data) is None
    assert perf_counter() - started < 0.5
