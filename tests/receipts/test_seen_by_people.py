"""Receipts before the eyes of people: the lists and single messages of the command and of the page."""

import json
import re
from datetime import UTC, datetime, timedelta
from html import unescape
from importlib.resources import files

import pytest
from admin_page import admin_of, ids_of
from by_hand import update
from conftest import new_message, queue, row
from shell import talk
from sqlalchemy.orm import Session

from engagement import EngagementMessageRepository, InDoubt, process_message_queue
from engagement._operating.lists import count_messages, list_messages
from receipts.test_recording import named, receipt, record, sent

AT = datetime(2026, 11, 29, 12, 0, 30, tzinfo=UTC)
HAS_DELIVERY, HAS_READ, IS_SENT, IS_UNDELIVERABLE, IS_DOUBTED, IS_TRIED_AGAIN, IS_PENDING = range(1, 8)


@pytest.fixture(name="seven", autouse=True)
def _seven(engine):
    """Seven messages: by the words of their providers, and two of which no word holds."""
    told = ["delivered", "read", None, "undeliverable", None, "undeliverable", None]
    for number, event in enumerate(told, start=1):
        outcome = InDoubt("?") if number == IS_DOUBTED else f"id-{number}"
        if number == IS_PENDING:
            queue(engine, new_message("user7", scheduled_for=datetime.now(UTC) + timedelta(days=1)))
            continue
        message_id = sent(engine, outcome, user_id=f"user{number}")
        assert message_id == number
        if event:
            record(engine, receipt(event, at=AT, reference=named(engine, message_id), code="131026"))
    with Session(engine) as session, session.begin():
        assert EngagementMessageRepository(session).retry_message(IS_TRIED_AGAIN)
    process_message_queue(engine, lambda _: "again")
    assert row(engine, IS_TRIED_AGAIN).status == "sent"
    assert row(engine, IS_TRIED_AGAIN).undeliverable_at
    return engine


WHICH = [
    (["--delivered"], {"delivered": True}, "delivered", [HAS_READ, HAS_DELIVERY]),
    (["--not-delivered"], {"delivered": False}, "not delivered", [IS_TRIED_AGAIN, IS_SENT]),
    (["--read"], {"read": True}, "read", [HAS_READ]),
    (["--not-read"], {"read": False}, "not read", [IS_TRIED_AGAIN, IS_SENT, HAS_DELIVERY]),
    (["--undeliverable"], {"undeliverable": True}, "undeliverable", [IS_UNDELIVERABLE]),
    (["--delivered", "--not-read"], {"delivered": True, "read": False}, None, [HAS_DELIVERY]),
    (["--undeliverable", "--status", "sent"], {"undeliverable": True, "status": ["sent"]}, None, []),
]


@pytest.mark.parametrize(("options", "filters", "choice", "expected"), WHICH)
def test_receipts_choose_messages(run, engine, options, filters, choice, expected):  # noqa: PLR0917
    """Delivered and read are facts; without them a message is `sent`; undeliverable holds until it is tried again."""
    listed = json.loads(run("list", "--json", *options, on=engine).out)["messages"]
    with Session(engine) as session:
        found = [message.id for message in list_messages(session, **filters)]
        counted = count_messages(session, **filters)

    assert ([message["id"] for message in listed], found, counted) == (expected, expected, len(expected))
    if choice is not None:
        with admin_of(engine) as page:
            assert ids_of(page.get(f"messages?receipt={choice}")) == expected


def test_a_program_is_told_the_moments(run, engine):
    """In JSON and in lines, each moment by its column; `receipt` says which of them holds."""
    listed = json.loads(run("list", "--json", on=engine).out)["messages"]
    header, *lines = [line.split("\t") for line in run("list").out.splitlines()]
    shown = json.loads(run("show", str(HAS_READ), "--json").out)

    receipts = {each["id"]: each["receipt"] for each in listed}
    assert receipts == {
        HAS_DELIVERY: "delivered", HAS_READ: "read", IS_SENT: None, IS_UNDELIVERABLE: "undeliverable",
        IS_DOUBTED: None, IS_TRIED_AGAIN: None, IS_PENDING: None,
    }  # fmt: skip
    (read,) = [each for each in listed if each["id"] == HAS_READ]
    (dead,) = [each for each in listed if each["id"] == IS_UNDELIVERABLE]
    at = AT.isoformat()
    assert (read["delivered_at"], read["read_at"], read["undeliverable_at"]) == (at, at, None)
    assert (dead["delivered_at"], dead["read_at"], dead["undeliverable_at"]) == (None, None, at)
    first = header.index("delivered_at")
    assert header[first : first + 3] == ["delivered_at", "read_at", "undeliverable_at"]
    assert {int(line[0]): line[first : first + 3] for line in lines}[HAS_READ] == [at, at, ""]
    assert (shown["read_at"], shown["receipt"]) == (at, "read")


def test_a_person_sees_the_latest_receipt_beside_the_status(engine):
    """In a list of 80 columns; where no message has a receipt, no column is spent on them."""
    shown = re.sub(r"\x1b\[[0-9;]*m", "", talk("list", on=engine, answer="").out)
    update(engine, "delivered_at = NULL, read_at = NULL, undeliverable_at = NULL")
    bare = re.sub(r"\x1b\[[0-9;]*m", "", talk("list", on=engine, answer="").out)

    assert max(map(len, shown.splitlines())) <= 80
    assert re.search(r"^id +status +receipt +type", shown, re.MULTILINE)
    lines = [
        (HAS_DELIVERY, "sent +delivered"),
        (HAS_READ, "sent +read"),
        (IS_UNDELIVERABLE, "failed +undeliverable"),
        (IS_TRIED_AGAIN, "sent +good"),
    ]
    for message_id, words in lines:
        assert re.search(rf"^{message_id} +{words}", shown, re.MULTILINE), words
    assert re.search(r"^id +status +message type", bare, re.MULTILINE)


def test_a_person_is_shown_the_moments_of_one_message(engine):
    """In UTC, among its facts and in its timeline."""
    shown = re.sub(r"\x1b\[[0-9;]*m", "", talk("show", str(HAS_READ), on=engine, answer="").out)

    for name in ("delivered at", "read at"):
        assert re.search(rf"{name} +. +2026-11-29 12:00:30Z", shown)
    assert re.search(r"receipt +. +read", shown)
    assert re.search(r"2026-11-29 12:00:30Z +read", shown)


def test_the_page_has_a_sign_beside_the_status(engine):
    """In the list and above one message, as a word; none where a receipt holds no more."""
    with admin_of(engine) as page:
        rows = re.findall(r"<tr>\s*<td.*?</tr>", page.get("messages").text, re.DOTALL)
        signs = dict(map(signs_of, rows))
        one, other = (page.get(f"messages/{message_id}").text for message_id in (HAS_DELIVERY, IS_TRIED_AGAIN))
        asked = unescape(page.get("messages?receipt=not+read").text)

    assert signs == {
        HAS_DELIVERY: ["status-sent", "receipt-delivered"],
        HAS_READ: ["status-sent", "receipt-read"],
        IS_SENT: ["status-sent"],
        IS_UNDELIVERABLE: ["status-failed", "receipt-undeliverable"],
        IS_DOUBTED: ["status-in_doubt"],
        IS_TRIED_AGAIN: ["status-sent"],
        IS_PENDING: ["status-pending"],
    }
    assert re.search(r'class="badge receipt-delivered">delivered<', one)
    assert "badge receipt-" not in other
    assert re.search(r'<option value="not read" selected>', asked)
    styles = (files("engagement.admin") / "static" / "engagement.css").read_text()
    assert all(f".receipt-{word}" in styles for word in ("delivered", "read", "undeliverable"))


def signs_of(line: str) -> tuple[int, list[str]]:
    return int(re.search(r"messages/(\d+)", line)[1]), re.findall(r'class="badge ([\w-]+)"', line)
