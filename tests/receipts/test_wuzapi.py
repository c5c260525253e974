"""The receipts of wuzapi."""

from datetime import UTC, datetime
from urllib.parse import quote

import pytest
from conftest import outgoing
from hypothesis import given
from hypothesis import strategies as st

from engagement.messages import Receipt
from engagement.receipts.sources import UnreadableReceipts, Unsigned
from engagement.receipts.wuzapi import WuzapiReceipts
from receipts.gateway_webhooks import (
    JUNK,
    MALFORMED,
    NOW,
    NUMBER,
    OLD_SECRET,
    OURS,
    SECRET,
    a_clock,
    as_form,
    as_json,
    check_hostile,
    check_secrets,
    mangled,
    receipt,
    signature,
    wuzapi_headers,
)

SOURCE = WuzapiReceipts(key=SECRET, now=a_clock)
AT = datetime(2026, 3, 1, 11, 59, 58, tzinfo=UTC)
OTHER = outgoing(id=8, idempotency_key="user2:goodbye:2026-01-01").whatsapp_id
FORMATS = pytest.mark.parametrize("form", [as_form, as_json])


def read(posted, form=as_form):
    """Return the receipts of an event."""
    body = form(posted)
    return list(SOURCE.read(body, wuzapi_headers(body)))


def ours(event, at=AT, message_id=OURS):
    """Return the receipt of our message."""
    return Receipt(event=event, at=at, provider="wuzapi", provider_message_id=message_id)


@FORMATS
@pytest.mark.parametrize(("kind", "event"), [("", "delivered"), ("read", "read"), ("played", "read")])
def test_a_receipt_of_the_recipient_is_one_of_ours(form, kind, event):
    """It comes as a form or as JSON, and names our own WhatsApp id."""
    assert read(receipt(kind), form) == [ours(event)]


@FORMATS
def test_a_receipt_names_many_messages(form):
    """Whoever opens a chat reads all that is new in it."""
    assert read(receipt("read", MessageIDs=[OURS, OTHER]), form) == [ours("read"), ours("read", message_id=OTHER)]


@pytest.mark.parametrize(
    "kind", ["read-self", "played-self", "sender", "retry", "server-error", "inactive", "peer_msg", "x"]
)
def test_other_kinds_say_nothing(kind):
    """`retry` is a device that could not read it, `sender` and `…-self` are devices of our own."""
    assert read(receipt(kind)) == []


@pytest.mark.parametrize("kind", ["", "read"])
def test_our_own_devices_are_no_recipients(kind):
    """Our phone read a message that somebody sent us."""
    assert read(receipt(kind, IsFromMe=True)) == []


@pytest.mark.parametrize("none", [None, []])
def test_a_receipt_of_no_message_says_nothing(none):
    """Go's empty list is null in JSON."""
    assert read(receipt(MessageIDs=none)) == []


@pytest.mark.parametrize(
    ("text", "at"),
    [
        ("2026-03-01T11:59:58Z", AT),
        ("2026-03-01T11:59:58.5+00:00", AT.replace(microsecond=500000)),
        ("2026-03-01T11:59:58.123456789Z", AT.replace(microsecond=123456)),
        ("0001-01-01T00:00:00Z", NOW),
    ],
)
def test_the_time_is_the_event_s(text, at):
    """Go writes RFC 3339 in the gateway's zone. Its zero is a time that was not told."""
    assert read(receipt(Timestamp=text)) == [ours("delivered", at=at)]


@FORMATS
def test_one_that_cannot_be_read_takes_no_other_with_it(form, caplog):
    """It is left out, with one line for the request that names nobody."""
    bad = [None, 7, "", "\n", [OURS], "a" * 600]

    assert read(receipt(MessageIDs=[*bad, OURS, *bad, OTHER]), form) == [
        ours("delivered"),
        ours("delivered", message_id=OTHER),
    ]
    assert caplog.messages == ["engagement.receipt_unreadable provider=wuzapi"]


@pytest.mark.parametrize("kind", ["Message", "Presence", "ChatPresence", "HistorySync", "LabelEdit", ""])
def test_other_events_are_no_receipts(kind):
    """They are read no further."""
    assert read({"type": kind, "event": 7}) == []


# The proof


@FORMATS
def test_a_forged_request_is_unsigned(form):
    """Another key, another body, half a signature, another algorithm or none: none is read, whatever it holds."""
    body = form(receipt())
    good = wuzapi_headers(body)["x-hmac-signature"]
    for forged in (
        signature(body, OLD_SECRET, "sha256"),
        signature(body + b" ", SECRET, "sha256"),
        signature(body, SECRET, "sha512"),
        good[:-1],
        good + "0",
        f"sha256={good}",
        "",
        "\ud800é",
    ):
        with pytest.raises(Unsigned, match=r"^the header x-hmac-signature is wrong$"):
            SOURCE.read(body, {"x-hmac-signature": forged})
    with pytest.raises(Unsigned, match=r"^the header x-hmac-signature is missing$"):
        SOURCE.read(body, {"token": SECRET})
    with pytest.raises(Unsigned):
        SOURCE.read(b"{", {"x-hmac-signature": good})


def test_a_gateway_that_signs_nothing_is_refused():
    """Wuzapi of 2025-05 sends its token in the form: that opens the gateway, and proves nothing here."""
    body = as_form(receipt()) + f"&token={SECRET}".encode()

    with pytest.raises(Unsigned):
        SOURCE.read(body, {})


@pytest.mark.parametrize("key", [SECRET, OLD_SECRET])
def test_the_key_is_changed_without_a_gap(key):
    """The old and the new one are both taken."""
    body = as_form(receipt())
    source = WuzapiReceipts(key=[OLD_SECRET, SECRET])

    assert list(source.read(body, wuzapi_headers(body, key))) == [ours("delivered")]


def test_a_source_has_a_key():
    """It is checked when the source is made, and never shown; wuzapi takes none under 32 characters."""
    check_secrets(lambda given: WuzapiReceipts(key=given), "key", 32)


# Bodies that no gateway sends


@pytest.mark.parametrize(
    "body",
    [
        *MALFORMED,
        *(b"jsonData=" + quote(body).encode() for body in MALFORMED),
        b"instanceName=main&userID=1",
        as_form(receipt()) + b"&jsonData=%7B%7D",
        b"&".join([b"a=1"] * 1000) + b"&" + as_form(receipt()),
        as_form(receipt()).replace(OURS.encode(), b"3EB0%FF"),
        "jsonData=é".encode(),
    ],
)
def test_a_malformed_body_is_refused(body):
    """With one kind of error, which holds nothing of the body."""
    with pytest.raises(UnreadableReceipts) as caught:
        SOURCE.read(body, wuzapi_headers(body))
    assert caught.value.status == 400
    assert caught.value.__context__ is None


@FORMATS
@pytest.mark.parametrize(
    "posted",
    [
        {"type": "ReadReceipt"},
        {"type": "ReadReceipt", "event": []},
        receipt(None),
        receipt(["read"]),
        receipt(IsFromMe=None),
        receipt(IsFromMe=0),
        receipt(IsFromMe="false"),
        receipt(MessageIDs=OURS),
        receipt(MessageIDs={"0": OURS}),
        receipt(MessageIDs=[None]),
        receipt(MessageIDs=[None, f"{NUMBER}\n"]),
        receipt(Timestamp=None),
        receipt(Timestamp=1772366398),
        receipt(Timestamp=""),
        receipt(Timestamp="yesterday"),
        receipt(Timestamp="2026-03-01T11:59:58"),
        receipt(Timestamp="9999-12-31T23:59:59-23:59"),
    ],
)
def test_a_receipt_with_a_part_of_a_wrong_kind_is_refused(posted, form):
    """Nothing is guessed, and a text is no list of letters."""
    with pytest.raises(UnreadableReceipts) as caught:
        read(posted, form)
    assert NUMBER not in str(caught.value)


@given(mangled(receipt("read")), st.sampled_from([as_form, as_json]))
def test_a_mangled_body_has_no_other_error(posted, form):
    """One place of it holds anything at all."""
    check_hostile(lambda: read(posted, form))


@given(
    JUNK.map(as_json) | st.binary(max_size=200) | st.binary(max_size=100).map(b"jsonData=".__add__),
    st.text(max_size=60),
)
def test_any_bytes_have_no_other_error(body, header):
    """Nor has any header."""
    check_hostile(lambda: SOURCE.read(body, wuzapi_headers(body)))
    with pytest.raises(Unsigned):
        SOURCE.read(body, {"x-hmac-signature": header})
