"""Receipts in our own form, signed as Standard Webhooks 1.0 describes it."""

import base64
import contextlib
import hashlib
import hmac
import json
from datetime import UTC, datetime, timedelta, timezone

import conftest
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engagement.messages import Receipt, delivery_id, reference
from engagement.messages.receipts import RECEIPT_EVENTS
from engagement.receipts.signed import SignedReceipts
from engagement.receipts.sources import UnreadableReceipts, Unsigned
from engagement.transports.webhook import Webhook

from .hostile import NO_JSON_OBJECTS, json_values

KEY_BYTES = bytes(range(24))
SECRET = "whsec_" + base64.b64encode(KEY_BYTES).decode()
NEW = "whsec_" + base64.b64encode(bytes(range(32))).decode()
REFERENCE = reference(7, delivery_id("user7:goodbye:2026-11-24"))
NOW = datetime(2026, 11, 29, 10, 0, tzinfo=UTC)
SOURCE = SignedReceipts(SECRET)


def element(**fields) -> dict:
    given = {"event": "delivered", "at": "2026-11-29T10:00:00Z", "reference": REFERENCE} | fields
    return {name: value for name, value in given.items() if value is not ...}


def signed(body: bytes, key=KEY_BYTES, at=NOW, webhook_id="msg_p5jXN8AQM9LWM0D4loKWxJek") -> dict[str, str]:
    """Sign as the specification says, without the code of the package."""
    timestamp = str(int(at.timestamp()))
    digest = hmac.new(key, f"{webhook_id}.{timestamp}.".encode() + body, hashlib.sha256).digest()
    return {
        "webhook-id": webhook_id,
        "webhook-timestamp": timestamp,
        "webhook-signature": f"v1,{base64.b64encode(digest).decode()}",
    }


def read(data, source=SOURCE) -> list[Receipt]:
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    return source.read(body, signed(body), now=NOW)


# What is reported


def test_a_list_of_receipts_is_read():
    """Each with what it names, in their order."""
    receipts = read(
        {
            "receipts": [
                element(),
                element(event="read", reference=..., provider_message_id="SM7", at="2026-11-29T07:00:00-03:00"),
                element(event="undeliverable", reason="number unknown", code="21211", provider_message_id="SM7"),
                element(event="accepted", reason=None, code=None, provider_message_id=None, something="else"),
            ]
        }
    )

    assert receipts == [
        Receipt(event="delivered", at=NOW, provider="webhook", reference=REFERENCE),
        Receipt(event="read", at=NOW, provider="webhook", provider_message_id="SM7"),
        Receipt(
            event="undeliverable", at=NOW, provider="webhook", reference=REFERENCE, provider_message_id="SM7",
            reason="number unknown", code="21211",
        ),
        Receipt(event="accepted", at=NOW, provider="webhook", reference=REFERENCE),
    ]  # fmt: skip
    assert {receipt.provider for receipt in receipts} == {SOURCE.name}


def test_one_receipt_stands_alone():
    """Without a list around it."""
    assert read(element()) == read({"receipts": [element()]})


def test_no_receipts_are_none():
    """An empty list is no mistake."""
    assert read({"receipts": []}) == []


def test_the_reference_is_the_one_that_our_transport_gave():
    """The endpoint has it from the body of the message that it was given, and reports it as it is."""
    message = conftest.outgoing(id=7, idempotency_key="user7:goodbye:2026-11-24")
    transport = Webhook(url="http://h/hooks", secret=SECRET)
    request = transport.prepare(message)
    transport.close()

    (receipt,) = read(element(reference=json.loads(request.body)["reference"]))

    assert receipt.reference == message.reference
    with pytest.raises(UnreadableReceipts) as caught:  # Our own request, sent back with the signature that we gave it.
        SOURCE.read(request.body, request.headers)
    assert type(caught.value) is UnreadableReceipts


@pytest.mark.parametrize(
    ("field", "value", "problem"),
    [
        ("event", ..., "event: must be one of accepted, delivered, read, undeliverable"),
        ("event", "bounced", "event: must be one of accepted, delivered, read, undeliverable"),
        ("event", ["read"], "event: must be text, not list"),
        ("at", ..., "at: is missing"),
        ("at", None, "at: is missing"),
        ("at", "2026-11-29T10:00:00", "at: is naive: give it a time zone"),
        ("at", "2026-11-29", "at: is naive: give it a time zone"),
        ("at", "0001-01-01T00:00:00Z", "at: is out of range: 1-01-02 to 9999-12-30"),
        ("at", "10 o'clock", "at: must be an ISO 8601 time with an offset, such as 2026-11-29T10:00:00Z"),
        ("at", 1750030073, "at: must be an ISO 8601 time with an offset, such as 2026-11-29T10:00:00Z"),
        ("reference", ..., "reference: is missing, and provider_message_id too: one of them names the message"),
        ("reference", "7", "reference: is no OutgoingMessage.reference"),
        ("reference", 7, "reference: must be text, not int"),
        ("provider_message_id", "", "provider_message_id: is empty"),
        ("provider_message_id", "x" * 513, "provider_message_id: has 513 characters, more than 512"),
        ("reason", 7, "reason: must be text, not int"),
        ("reason", "x" * 1001, "reason: has 1001 characters, more than 1000"),
        (
            "reason",
            "two\nlines",
            "reason: holds a control character, which is refused (PostgreSQL cannot store NUL)",
        ),
        ("code", 21211, "code: must be text, not int"),
        ("code", "\ud800", "code: holds a lone surrogate, which is no character"),
    ],
)
def test_a_mistake_is_named_with_its_index(field, value, problem):
    """It is the host's own bug, so nothing of the request counts, and the answer says where it is."""
    with pytest.raises(UnreadableReceipts) as caught:
        read({"receipts": [element(), element(**{field: value})]})
    assert (str(caught.value), caught.value.status) == (f"receipts[1].{problem}", 400)

    with pytest.raises(UnreadableReceipts) as caught:
        read(element(**{field: value}))
    assert str(caught.value) == problem


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        ({"receipts": None}, "receipts: must be a list"),
        ({"receipts": element()}, "receipts: must be a list"),
        ({"receipts": [element(), None]}, "receipts[1]: must be an object"),
        ({"receipts": [[element()]]}, "receipts[0]: must be an object"),
        ({}, "at: is missing"),
    ],
)
def test_another_form_is_named(data, problem):
    """Likewise."""
    with pytest.raises(UnreadableReceipts) as caught:
        read(data)
    assert str(caught.value) == problem


# Who signed it


BODY = json.dumps(element()).encode()


def test_the_signature_is_the_one_of_the_specification():
    """Checked against the example of the specification's own libraries, whose body is no receipt."""
    source = SignedReceipts("whsec_MfKQ9r8GKYqrTwjUPD8ILPZIo2LaLaSw")
    headers = {
        "webhook-id": "msg_p5jXN8AQM9LWM0D4loKWxJek",
        "webhook-timestamp": "1614265330",
        "webhook-signature": "v1,g0hM9SsE+OTPJTGt/tmIKtSyZlE3uFJELVlNIOLJ1OE=",
    }
    with pytest.raises(UnreadableReceipts, match=r"^at: is missing$"):
        source.read(b'{"test": 2432232314}', headers, now=datetime.fromtimestamp(1614265330, UTC))


def test_one_of_several_signatures_and_secrets_is_enough():
    """So a secret is changed without a gap, from either side. Signatures of another version say nothing."""
    old, new = (signed(BODY, key)["webhook-signature"] for key in (KEY_BYTES, bytes(range(32))))
    both = SignedReceipts([NEW, SECRET])

    for source, signatures in (
        (SOURCE, old),
        (SOURCE, f"{new} {old}"),
        (SOURCE, f"v1a,AAAA {old}"),
        (both, old),
        (both, new),
    ):
        headers = signed(BODY) | {"webhook-signature": signatures}
        assert len(source.read(BODY, headers, now=NOW)) == 1
    with pytest.raises(Unsigned):
        SOURCE.read(BODY, signed(BODY) | {"webhook-signature": new}, now=NOW)


GOOD = signed(BODY)["webhook-signature"]


@pytest.mark.parametrize(
    "forged",
    [
        ...,
        "",
        "v1,",
        GOOD[:-1],
        GOOD + "=",
        GOOD.removeprefix("v1,"),
        GOOD.replace("v1", "v2"),
        GOOD.replace("v1", "v1a"),
        GOOD.swapcase(),
        f"{GOOD},{GOOD}",
        signed(BODY, b"")["webhook-signature"],
        signed(BODY, SECRET.encode())["webhook-signature"],
        "v1," + base64.b64encode(hmac.digest(KEY_BYTES, BODY, "sha256")).decode(),
        "v1,é",
        "v1,\ud800",
        "v1, " * 10_000,
    ],
)
def test_a_forged_signature_is_refused(forged):
    """Before anything of the body is looked at: it may be anything."""
    headers = signed(BODY)
    del headers["webhook-signature"]
    if forged is not ...:
        headers["webhook-signature"] = forged
    for body in (BODY, b"{", b"[" * 200_000):
        with pytest.raises(Unsigned) as caught:
            SOURCE.read(body, headers, now=NOW)
        assert caught.value.status == 401
        assert SECRET not in str(caught.value)


@pytest.mark.parametrize("name", ["webhook-id", "webhook-timestamp"])
@pytest.mark.parametrize(
    "value", [..., "", "0", "msg_é", "\ud800", "1e9", "-1", "9" * 12, "٣", " 1", "1.0", "x" * 9999]
)
def test_a_forged_header_is_refused(name, value):
    """Both are under the signature."""
    headers = signed(BODY)
    del headers[name]
    if value is not ...:
        headers[name] = value
    with pytest.raises(Unsigned):
        SOURCE.read(BODY, headers, now=NOW)


def test_a_changed_body_is_refused():
    """The signature of one body opens no other."""
    with pytest.raises(Unsigned):
        SOURCE.read(BODY.replace(b"delivered", b"read"), signed(BODY), now=NOW)


@pytest.mark.parametrize(("tolerance", "seconds"), [(timedelta(minutes=5), 300), (timedelta(seconds=10), 10)])
def test_an_old_request_is_refused(tolerance, seconds):
    """It may be one that somebody else has seen. One from the future could be sent again for as long, so it is too."""
    source = SignedReceipts(SECRET, tolerance)
    for good in (-seconds, 0, seconds):
        headers = signed(BODY, at=NOW + timedelta(seconds=good))
        assert len(source.read(BODY, headers, now=NOW)) == 1
    for bad in (-seconds - 1, seconds + 1, -(10**9), 10**9):
        with pytest.raises(Unsigned) as caught:
            source.read(BODY, signed(BODY, at=NOW + timedelta(seconds=bad)), now=NOW)
        assert "webhook-timestamp" in str(caught.value)


def test_a_replay_within_the_tolerance_is_read_as_before():
    """It does no harm: whoever records a receipt again changes nothing."""
    headers = signed(BODY)

    assert SOURCE.read(BODY, headers, now=NOW) == SOURCE.read(BODY, headers, now=NOW + timedelta(minutes=4))


def test_the_clock_is_that_of_the_machine():
    """If nobody gives another time."""
    now = datetime.now(timezone(timedelta(hours=-3)))

    assert len(SOURCE.read(BODY, signed(BODY, at=now))) == 1
    with pytest.raises(Unsigned):
        SOURCE.read(BODY, signed(BODY, at=now - timedelta(minutes=6)))


# Bodies that nobody should send


@pytest.mark.parametrize("body", NO_JSON_OBJECTS, ids=lambda body: repr(body[:40]))
def test_a_body_that_is_no_json_object_is_refused(body):
    """With 400, and without a word of it."""
    with pytest.raises(UnreadableReceipts) as caught:
        read(body)

    assert (type(caught.value), caught.value.status) == (UnreadableReceipts, 400)
    assert caught.value.__cause__ is caught.value.__context__ is None


@given(st.binary())
def test_any_bytes_are_receipts_or_refused(body):
    """No other error leaves the parser."""
    with contextlib.suppress(UnreadableReceipts):
        assert read(body) == []


FIELDS = ["event", "at", "reference", "provider_message_id", "reason", "code"]
JSON = json_values(*RECEIPT_EVENTS, REFERENCE, "2026-11-29T10:00:00Z", fields=["receipts", *FIELDS])


@given(
    st.one_of(
        JSON,
        st.builds(lambda value: {"receipts": value}, JSON),
        st.builds(lambda field, value: element() | {field: value}, st.sampled_from(FIELDS), st.one_of(st.text(), JSON)),
    )
)
def test_any_json_is_receipts_or_refused(data):
    """No other error leaves the parser, and each receipt is one that can be recorded."""
    with contextlib.suppress(UnreadableReceipts):
        for receipt in read(data):
            texts = (receipt.provider_message_id, receipt.reason, receipt.code)
            assert receipt.event in RECEIPT_EVENTS
            assert all(text is None or (text and not set(text) & set("\x00\ud800")) for text in texts)


# What it is made with


@pytest.mark.parametrize(
    "secret", ["", "plain", "whsec_", "whsec_!!!", "whsec_" + base64.b64encode(bytes(23)).decode(), SECRET + "\n", 7]
)
def test_a_weak_or_broken_secret_is_refused_at_once(secret):
    """One of several likewise."""
    for given_secret in ([secret], [SECRET, secret]):
        with pytest.raises(ValueError, match=r"^secret: must be whsec_ and 24 bytes or more in Base64$"):
            SignedReceipts(given_secret)


@pytest.mark.parametrize("none", [[], (), None])
def test_no_secret_at_all_is_refused(none):
    """Otherwise nothing could ever be received."""
    with pytest.raises(ValueError, match=r"^secret: none is given$"):
        SignedReceipts(none)


@pytest.mark.parametrize("tolerance", [timedelta(0), timedelta(seconds=-1), 300, None])
def test_a_tolerance_that_is_none_is_refused(tolerance):
    """With zero, a request of the same second alone would pass."""
    with pytest.raises(ValueError, match=r"^tolerance: must be a timedelta of more than zero$"):
        SignedReceipts(SECRET, tolerance)


def test_no_secret_and_no_person_is_shown():
    """Neither in a repr nor in an error."""
    with pytest.raises(UnreadableReceipts) as caught:
        read(element(provider_message_id="5511987654321\n"))
    shown = repr(SOURCE) + repr(read(element(provider_message_id="5511987654321"))) + str(caught.value)

    assert not [word for word in (SECRET, SECRET[6:], repr(KEY_BYTES), "5511987654321") if word in shown]
