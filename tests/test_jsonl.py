import io
import json
import time
import tracemalloc
from datetime import UTC, datetime, timedelta
from zoneinfo import ZoneInfo

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engagement._operating.jsonl import FIELDS, MAX_LINE_BYTES, REQUIRED, BadLine, read_messages

SECRET = "Rosalind"
GOOD = {
    "user_id": "ana",
    "message_type": "goodbye",
    "message_key": "goodbye.14_days",
    "destination": "individual",
    "destination_jid": "447700900101@s.whatsapp.net",
}


def line(**fields) -> bytes:
    return json.dumps(GOOD | fields).encode() + b"\n"


def read(source: bytes):
    """Return the messages and the bad lines of a file."""
    bad = []
    messages = list(read_messages(io.BytesIO(source), bad.append))
    return messages, bad


def only_problem(source: bytes) -> BadLine:
    messages, bad = read(source)
    assert messages == []
    assert len(bad) == 1
    return bad[0]


def test_a_line_becomes_the_message_that_it_says():
    """Every field is read: times with their offset, the zone by its name, null as not given."""
    given_fields = {
        "message_params": {"name": "Ana", "days": 14},
        "scheduled_for": "2025-11-21T22:30:00-03:00",
        "expires_at": "2025-11-22T12:00:00Z",
        "tz": "America/Sao_Paulo",
        "idempotency_key": None,
    }
    (message,), bad = read(line(**given_fields))

    assert bad == []
    assert message.scheduled_for == datetime(2025, 11, 22, 1, 30, tzinfo=UTC)
    assert message.scheduled_for.utcoffset() == timedelta(hours=-3)
    assert message.expires_at == datetime(2025, 11, 22, 12, tzinfo=UTC)
    assert (message.tz, message.key) == (ZoneInfo("America/Sao_Paulo"), "ana:goodbye:2025-11-21")
    assert message.message_params == {"name": "Ana", "days": 14}


def test_only_what_a_message_cannot_do_without_is_required():
    """The five fields without a default are required, and each missing one is named."""
    assert set(REQUIRED) == set(GOOD)
    for name in REQUIRED:
        without = {key: value for key, value in GOOD.items() if key != name}
        assert only_problem(json.dumps(without).encode()) == BadLine(1, name, "is missing")
        assert only_problem(line(**{name: None})) == BadLine(1, name, "is missing")


def test_bad_lines_stop_no_good_ones_and_are_numbered_as_an_editor_does():
    """Good lines around bad and empty ones are read, and empty ones count."""
    source = b"\xef\xbb\xbf" + line(user_id="a") + b"\n  \r\n" + b"{oops}\n" + line(user_id="b").replace(b"\n", b"\r\n")
    source += line(user_id="") + line(user_id="c").rstrip()
    messages, bad = read(source)

    assert [message.user_id for message in messages] == ["a", "b", "c"]
    assert [(problem.number, problem.field) for problem in bad] == [(4, ""), (6, "user_id")]


def test_a_mark_is_tolerated_at_the_very_beginning_only():
    """A byte-order mark is no content in front of the file, and an error elsewhere."""
    messages, bad = read(b"\xef\xbb\xbf" + line() + b"\xef\xbb\xbf" + line(user_id="b"))

    assert len(messages) == 1
    assert [problem.number for problem in bad] == [2]


@pytest.mark.parametrize(
    ("source", "expected"),
    [
        (b"{oops}\n", "line 1: is no JSON: expecting property name enclosed in double quotes (column 2)"),
        (b'{"user_id": "a"} trailing\n', "line 1: is no JSON: extra data (column 18)"),
        (b'["user_id"]\n', "line 1: must be a JSON object"),
        (b"null\n", "line 1: must be a JSON object"),
        (b'{"user_id": "\xff"}\n', "line 1: is not UTF-8 (byte 14)"),
        (line()[:-2] + b', "user_id": "b"}', "line 1: user_id: is there twice"),
        (
            line(message_params=1).replace(b": 1}", b': {"a": 1, "a": 2}}'),
            "line 1: message_params: has the same key twice",
        ),
        (line(message_params=1).replace(b": 1}", b': {"a": NaN}}'), "line 1: holds NaN, which is no JSON"),
        (line(message_params=1).replace(b": 1}", b': {"a": -Infinity}}'), "line 1: holds -Infinity, which is no JSON"),
        (line(message_params=1).replace(b": 1}", b': {"a": 1e999}}'), "line 1: message_params: holds a number that "),
        (
            line(message_params=1).replace(b": 1}", b': {"a": ' + b"1" * 5000 + b"}}"),
            "line 1: holds a number that Python",
        ),
        (line(message_params=1).replace(b": 1}", b": " + b"[" * 100_000 + b"}"), "line 1: is nested too deep"),
        (line(mesage_key="x"), "line 1: mesage_key: is no field of a message (did you mean message_key?)"),
        (line(params_json="{}"), "line 1: params_json: is no field of a message"),
        (line(scheduled_for="2025-11-21T22:30:00"), "line 1: scheduled_for: has no offset from UTC"),
        (line(expires_at="2025-11-21"), "line 1: expires_at: has no offset from UTC"),
        (line(scheduled_for="tomorrow"), "line 1: scheduled_for: must be an ISO 8601 time"),
        (line(scheduled_for=1763775000), "line 1: scheduled_for: must be an ISO 8601 time"),
        (line(scheduled_for="9999-12-31T23:59:59Z"), "line 1: scheduled_for: is out of range"),
        (line(tz="Sao Paulo"), "line 1: tz: is no time zone that this machine knows"),
        (line(tz="../../etc/passwd"), "line 1: tz: is no time zone that this machine knows"),
        (line(tz="/".join("a" * 500)), "line 1: tz: is no time zone that this machine knows"),
        (line(tz="America"), "line 1: tz: is no time zone that this machine knows"),
        (line(tz=3), "line 1: tz: is no time zone that this machine knows"),
        (line(destination="everybody"), "line 1: destination: must be individual or group"),
        (line(destination="group"), "line 1: destination_jid: must be <number>@g.us for a group"),
        (line(user_id={"a": 1}), "line 1: user_id: must be text, not dict"),
        (line(message_params=[1]), "line 1: message_params: must be a JSON object, not list"),
    ],
)
def test_a_bad_line_is_told_with_number_field_and_reason(source, expected):
    """Each thing that can be wrong with a line has one clear line that says so."""
    assert str(only_problem(source)).startswith(expected)


@pytest.mark.parametrize(
    "source",
    [
        line(**{SECRET: 1}).replace(SECRET.encode(), f"{SECRET} {SECRET}".encode()),
        line(user_id=SECRET * 100),
        line(user_id=SECRET + "\x00"),
        line(message_type=SECRET),
        line(destination=SECRET),
        line(destination_jid=SECRET),
        line(scheduled_for=SECRET),
        line(tz=SECRET),
        line(message_params={SECRET: "\x00"}),
        line()[:-2] + f', "{SECRET} x": 1, "{SECRET} x": 2}}'.encode(),
        line(message_params=1).replace(b": 1}", f': {{"{SECRET}": 1, "{SECRET}": 2}}}}'.encode()),
        f'{{"user_id": "{SECRET}'.encode(),
        SECRET.encode(),
    ],
)
def test_no_report_repeats_what_the_line_said(source):
    """What is in a bad line is about people, and stays out of the report."""
    assert SECRET not in str(only_problem(source))


@pytest.mark.parametrize(("excess", "is_read"), [(0, True), (1, False)])
def test_a_line_may_be_as_long_as_the_limit_and_no_longer(excess, is_read):
    """A line of exactly the limit is read, one of a byte more is bad, and the next line is read in both cases."""
    padded = line().rstrip() + b" " * (MAX_LINE_BYTES + excess - len(line())) + b"\n"
    messages, bad = read(padded + line(user_id="next"))

    assert [message.user_id for message in messages] == ["ana", "next"] if is_read else ["next"]
    assert [str(problem) for problem in bad] == ([] if is_read else ["line 1: has more than 1048576 bytes"])


def test_a_huge_line_is_skipped_in_little_memory():
    """A line of 10 MB is told and passed over without being held."""
    source = io.BytesIO(b'{"user_id": "' + b"x" * 10_000_000 + b'"}\n' + line())
    bad = []
    tracemalloc.start()
    messages = list(read_messages(source, bad.append))
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()

    assert (len(messages), [problem.number for problem in bad]) == (1, [1])
    assert peak < 4 * MAX_LINE_BYTES


def test_a_message_is_handed_out_before_the_next_line_is_read():
    """What comes through a pipe is taken as it comes: nothing is read ahead."""

    class Pipe(io.BytesIO):
        lines_read = 0

        def readline(self, size=-1, /):
            self.lines_read += 1
            return super().readline(size)

    pipe = Pipe(line() * 3)
    next(read_messages(pipe, pytest.fail))

    assert pipe.lines_read == 1


anything = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=6,
)
mangled = st.dictionaries(st.sampled_from(FIELDS), anything).map(lambda fields: json.dumps(GOOD | fields).encode())


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])  # the machine may be busy
@given(st.lists(st.binary(max_size=60) | mangled, max_size=6))
def test_whatever_the_file_holds_each_line_has_one_fate(lines):
    """Of any bytes whatsoever, each line that is not empty becomes one message or one report, and nothing is raised."""
    source = b"\n".join(lines)
    messages, bad = read(source)

    assert len(messages) + len(bad) == sum(
        bool(one.strip()) for one in source.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    )


@pytest.mark.parametrize(
    ("name", "made_of"),
    [
        ("tz", "a/"), ("tz", "../"), ("tz", "\0"), ("scheduled_for", "1"), ("expires_at", "+00:00"),
        ("user_id", "\u0301"), ("message_type", "_"), ("message_key", "."), ("destination", "g"),
        ("destination_jid", "1"), ("destination_jid", "1@"), ("idempotency_key", ":"), ("user_idd", "x"),
    ],
)  # fmt: skip
@pytest.mark.parametrize("length", [600, 60_000])
def test_whatever_stands_in_a_field_is_told_and_stops_nothing(name, made_of, length):
    """A field of any length and form is one bad line: the good ones around it are read."""
    too_much = line(**{name: (made_of * length)[:length]})

    messages, bad = read(line(user_id="a") + too_much + line(user_id="b"))

    assert [message.user_id for message in messages] == ["a", "b"]
    assert [(problem.number, problem.field) for problem in bad] == [(2, name)]


def keys(many: int) -> str:
    """Return an object of so many keys, the last of which it has twice."""
    return f'{{{"".join(f"{json.dumps(str(number))}:1," for number in range(many))}"{many - 1}":1}}'


@pytest.mark.parametrize(
    "written",
    [
        keys,
        lambda n: f'{{"message_params":{keys(n)}}}',
        lambda n: json.dumps({"tz": "a/" * n}),
        lambda n: json.dumps({"user_id" * n: 1}),
        lambda n: f'{{"message_params":{{"days":{"1" * n}.5}}}}',
        lambda n: json.dumps(GOOD | {"message_params": {"name": "\\" * n + "\0"}}),
        lambda n: json.dumps(GOOD | {"message_params": {"names": [{}] * n}}),
        lambda n: "[" * n,
    ],
)
def test_a_line_takes_time_in_proportion_to_its_length(written):
    """Twice as long a line takes twice as long, not four times: it is read inside of the open transaction."""

    def seconds(length: int) -> float:
        source = written(length).encode()

        def once() -> float:
            began = time.thread_time()
            read(source)
            return time.thread_time() - began

        return min(once() for _ in range(3))

    assert seconds(40_000) < 3 * seconds(20_000) + 0.05
