"""The status webhooks of Meta's Cloud API: who signed them, and what they say of a message."""

import contextlib
import hashlib
import hmac
import json
import logging
from datetime import UTC, datetime

import conftest
import pytest
from hypothesis import given
from hypothesis import strategies as st

from engagement.messages import InvalidMessage, Receipt, delivery_id, reference
from engagement.messages.receipts import RECEIPT_EVENTS
from engagement.receipts.cloud import CloudReceipts, is_unreachable_for_good
from engagement.receipts.sources import UnreadableReceipts, Unsigned, WrongToken
from engagement.transports.cloud import WhatsAppCloud
from engagement.transports.cloud_codes import CODES

from .hostile import NO_JSON_OBJECTS, json_values

SECRET = "5ebe2294ecd0e0f08eab7690d2a6ee69"
OTHER = "0cbc6611f5540bd0809a388dc95a615b"
NUMBER = "16505551234"
WAMID = "wamid.HBgLMTY1MDM4Nzk0MzkVAgASGBQzQUFERjg0NDEzNDdFODU3MUMxMAA="
REFERENCE = reference(7, delivery_id("user7:goodbye:2026-11-24"))
AT = datetime(2025, 6, 15, 23, 27, 53, tzinfo=UTC)
SOURCE = CloudReceipts(SECRET, "vibecoding")

# From Meta's "Status messages webhook reference" (2026-09-11) and "Business-scoped user IDs" (2026).
FAILED = {
    "id": "wamid.HBgLMTY1MDM4Nzk0MzkVAgARGBI0QUQ2MjA4NEYyRkExNjMyREUA",
    "status": "failed",
    "timestamp": "1751142888",
    "recipient_id": NUMBER,
    "errors": [
        {
            "code": 131049,
            "title": "This message was not delivered to maintain healthy ecosystem engagement.",
            "message": "This message was not delivered to maintain healthy ecosystem engagement.",
            "error_data": {
                "details": "In order to maintain a healthy ecosystem engagement, the message failed to be delivered."
            },
            "href": "/documentation/business-messaging/whatsapp/support/error-codes",
        }
    ],
}
WITHOUT_A_NUMBER = {
    "id": WAMID,
    "status": "delivered",
    "timestamp": "1750030073",
    "recipient_user_id": "US.13491208655302741918",
    "recipient_parent_user_id": "US.ENT.11815799212886844830",
    "pricing": {"billable": True, "pricing_model": "PMP", "type": "regular", "category": "marketing"},
}


def status(**fields) -> dict:
    return {"id": WAMID, "status": "sent", "timestamp": "1750030073", "recipient_id": NUMBER} | fields


def change(*statuses, field="messages", **value) -> dict:
    metadata = {"display_phone_number": "15550783881", "phone_number_id": "106540352242922"}
    given = {"messaging_product": "whatsapp", "metadata": metadata} | value
    return {"value": given | ({"statuses": list(statuses)} if statuses else {}), "field": field}


def event(*changes, **fields) -> dict:
    entry = {"id": "102290129340398", "changes": list(changes)}
    return {"object": "whatsapp_business_account", "entry": [entry]} | fields


def signed(body: bytes, secret=SECRET) -> dict[str, str]:
    digest = hmac.new(secret.encode(), body, hashlib.sha256).hexdigest()
    return {"x-hub-signature-256": f"sha256={digest}", "content-type": "application/json"}


def read(data, source=SOURCE) -> list[Receipt]:
    body = data if isinstance(data, bytes) else json.dumps(data).encode()
    return source.read(body, signed(body))


def receipts_of(*statuses) -> list[Receipt]:
    return read(event(change(*statuses)))


# What a status says


@pytest.mark.parametrize(
    ("word", "means"), [("sent", "accepted"), ("delivered", "delivered"), ("read", "read"), ("played", "read")]
)
def test_a_status_is_a_receipt(word, means):
    """By the words of Meta's reference; a voice message that was played was read."""
    (receipt,) = receipts_of(status(status=word))

    assert receipt == Receipt(event=means, at=AT, provider="cloud", provider_message_id=WAMID)
    assert receipt.at.tzinfo is UTC


def test_a_failed_status_is_undeliverable_with_its_code_and_title():
    """Meta's own example."""
    (receipt,) = receipts_of(FAILED)

    assert (receipt.event, receipt.code) == ("undeliverable", "131049")
    assert receipt.reason == "This message was not delivered to maintain healthy ecosystem engagement."
    assert receipt.at == datetime(2025, 6, 28, 20, 34, 48, tzinfo=UTC)
    assert receipt.provider_message_id == FAILED["id"]


@pytest.mark.parametrize("code", [code.code for code in CODES] + [131030, 999999])
def test_every_code_of_a_failed_status_is_an_end(code):
    """Meta does not try again, be it a limit, an outage or an unknown code."""
    (receipt,) = receipts_of(status(status="failed", errors=[{"code": code, "title": "Some title"}]))

    assert (receipt.event, receipt.code, receipt.reason) == ("undeliverable", str(code), "Some title")
    assert receipt.unreachable is is_unreachable_for_good(code)


@pytest.mark.parametrize(
    ("errors", "code", "reason"),
    [
        ([{"code": 131026, "message": "Message undeliverable"}], "131026", "Message undeliverable"),
        ([{"code": "131026", "title": "", "message": "Undeliverable"}], "131026", "Undeliverable"),
        ([{"code": 131026, "title": None}], "131026", None),
        ([{"title": "Message\nundeliverable \x00"}], None, "Message undeliverable"),
        ([{"code": 131026}, {"code": 131049}], "131026", None),
        ([{"code": True}], None, None),
        ([{"code": -1, "title": 7}], None, None),
        ([{"code": 10**30}], None, None),
        ([{"code": "x" * 9000, "title": "t" * 9000}], None, "t" * 1000),
        ([{"code": [131026], "title": {"a": "b"}}], None, None),
        ([], None, None),
        (["131026"], None, None),
        ({"code": 131026}, None, None),
        (None, None, None),
    ],
)
def test_errors_in_another_form_cost_no_receipt(errors, code, reason):
    """The failure is the fact. A code or title in a strange form is left out, and a long one cut."""
    (receipt,) = receipts_of(status(status="failed", errors=errors))

    assert (receipt.event, receipt.code, receipt.reason) == ("undeliverable", code, reason)


@pytest.mark.parametrize("number", [NUMBER, f"+{NUMBER}", "+1 650 555-1234", "+1 (650) 555.1234", "٠١٢٣٤٥٦٧٨٩"])
def test_a_reason_repeats_no_phone_number(number):
    """Neither from the details, which may quote the request, nor from a title that does."""
    error = {"code": 131026, "title": f"Cannot reach {number} now", "error_data": {"details": f"to: {number}"}}

    (receipt,) = receipts_of(status(status="failed", errors=[error]))

    assert receipt.reason == "Cannot reach … now"


@pytest.mark.parametrize("word", ["deleted", "warning", "DELIVERED", "pending", ""])
def test_another_status_is_no_receipt(word, caplog):
    """A word that Meta does not document says nothing, and is no mistake."""
    assert receipts_of(status(status=word)) == []
    assert caplog.records == []


def test_a_payment_is_no_receipt():
    """A payment that failed (WATI, "payment status") does not make a message undeliverable that was delivered."""
    payment = status(status="failed", type="payment", payment={"reference_id": "order-7"})

    assert receipts_of(payment, status(status="read", type="message")) == receipts_of(status(status="read"))


def test_one_of_a_group_that_was_not_reached_fails_no_message():
    """A status to a group is of one person in it. Delivery to one is delivery."""
    group = {"recipient_type": "group", "recipient_id": "fowefinoewcnw", "recipient_participant_id": NUMBER}

    receipts = receipts_of(status(status="failed", **group), status(status="delivered", **group))

    assert [receipt.event for receipt in receipts] == ["delivered"]


def test_sent_with_errors_ends_no_doubt(caplog):
    """A contradiction (`Error.json` of devlooped/WhatsApp) is no proof that a message left."""
    assert receipts_of(status(errors=[{"code": 470, "title": "Rate limit exceeded"}])) == []
    assert caplog.messages == ["engagement.receipt_unreadable provider=cloud count=1"]


def test_a_person_without_a_number_is_one_too():
    """Since 2026 `recipient_id` may be left out. The message is named by ids of its own."""
    (receipt,) = receipts_of(WITHOUT_A_NUMBER)

    assert receipt == Receipt(event="delivered", at=AT, provider="cloud", provider_message_id=WAMID)


def test_the_reference_of_our_transport_comes_back():
    """`biz_opaque_callback_data`, as `WhatsAppCloud` sends it, is the receipt's reference."""
    message = conftest.outgoing(id=7, idempotency_key="user7:goodbye:2026-11-24")
    transport = WhatsAppCloud(phone_number_id="106540352242922", token="t0k3n", render=lambda _: "Olá")
    sent = json.loads(transport.prepare(message).body)["biz_opaque_callback_data"]
    transport.close()

    (receipt,) = receipts_of(status(biz_opaque_callback_data=sent))

    assert receipt.reference == message.reference == REFERENCE
    assert receipt.provider_message_id == WAMID


@pytest.mark.parametrize(
    "data", ["some data", f"{REFERENCE} ", f"0{REFERENCE}", "", None, 7, [REFERENCE], {}, "\ud800"]
)
def test_data_of_the_hosts_own_is_no_reference(data, caplog):
    """A host's other messages may carry anything. Their receipts are read all the same."""
    (receipt,) = receipts_of(status(biz_opaque_callback_data=data))

    assert (receipt.reference, receipt.provider_message_id) == (None, WAMID)
    assert caplog.records == []


# Many in one request


def test_several_entries_and_changes_are_read_in_their_order():
    """Meta puts up to 1000 updates into one request, of several accounts, with other events between them."""
    ids = [f"wamid.{number}" for number in range(1000)]
    statuses = [status(id=each) for each in ids]
    first = event(
        change(*statuses[:400]),
        change(field="account_update", event="VERIFIED_ACCOUNT"),
        change(*statuses[400:401]),
    )["entry"]
    second = event(change(*statuses[401:]))["entry"]

    receipts = read(event() | {"entry": first + second})

    assert [receipt.provider_message_id for receipt in receipts] == ids


def test_a_status_that_comes_twice_is_read_twice():
    """Whoever records them knows what is known; a request that has been repeated is read as the first one was."""
    assert receipts_of(status(), status()) == receipts_of(status()) * 2
    assert receipts_of(status()) == receipts_of(status())


MALFORMED = [
    None,
    "status",
    [],
    {},
    status(status=None),
    status(status=["sent"]),
    status(id=None),
    status(id=7),
    status(id=""),
    status(id="x" * 513),
    status(id="a\x00b"),
    status(id="\ud800"),
    status(timestamp=None),
    status(timestamp=""),
    status(timestamp="-1"),
    status(timestamp="1750030073.5"),
    status(timestamp=1750030073.5),
    status(timestamp=True),
    status(timestamp="1750030073000"),
    status(timestamp=1750030073000),
    status(timestamp=10**400),
    status(timestamp="٣"),
    status(timestamp=" 1750030073"),
]


@pytest.mark.parametrize("malformed", MALFORMED, ids=str)
def test_a_malformed_status_takes_no_other_with_it(malformed, caplog):
    """An error would make Meta repeat the request for days, and then drop the good ones with the bad one."""
    receipts = receipts_of(status(id="wamid.1"), malformed, malformed, status(id="wamid.2"))

    assert [receipt.provider_message_id for receipt in receipts] == ["wamid.1", "wamid.2"]
    assert caplog.messages == ["engagement.receipt_unreadable provider=cloud count=2"]
    assert [record.levelno for record in caplog.records] == [logging.WARNING]


@pytest.mark.parametrize(
    "entries",
    [
        None,
        "entry",
        [None],
        [7],
        [{"changes": None}],
        [{"changes": {}}],
        [{"changes": [None]}],
        [{"changes": ["messages"]}],
        [{"changes": [{"field": "messages"}]}],
        [{"changes": [{"field": "messages", "value": []}]}],
        [{"changes": [{"field": "messages", "value": {"statuses": None}}]}],
        [{"changes": [{"field": "messages", "value": {"statuses": status()}}]}],
    ],
    ids=str,
)
def test_a_malformed_list_takes_no_other_with_it(entries, caplog):
    """Nor does something else in the place of an entry, a change, a value or the statuses."""
    good = event(change(status()))["entry"]
    given = entries + good if isinstance(entries, list) else entries

    assert len(read(event() | {"entry": given})) == isinstance(entries, list)
    assert caplog.messages == ["engagement.receipt_unreadable provider=cloud count=1"]


@pytest.mark.parametrize("timestamp", ["0", "1750030073", 1750030073, "99999999999"])
def test_a_time_that_can_be_held_is_read(timestamp):
    """Meta sends text; a number says the same."""
    (receipt,) = receipts_of(status(timestamp=timestamp))

    assert receipt.at.timestamp() == int(timestamp)


# Other events


@pytest.mark.parametrize(
    "data",
    [
        event(),
        event(change(messages=[{"from": NUMBER, "id": WAMID, "timestamp": "1749416383", "type": "text"}])),
        event(change(errors=[{"code": 131000, "title": "Something went wrong"}])),
        event(change(field="message_template_status_update", event="APPROVED", message_template_id=7)),
        event(change(field="account_update", event="ACCOUNT_VIOLATION")),
        # pywa's `call_status.json`, and one that has the words of a message.
        event(change(status(id="wacid.ABGG", type="call", status="RINGING"), field="calls")),
        event(change(status(status="failed"), field="calls")),
        event(change(field="user_preferences", user_preferences=[{"wa_id": NUMBER, "value": "stop"}])),
        event(change(status(), field=None)),
        event(change(status()), object="instagram"),
        event(change(status()), object=None),
        {},
    ],
)
def test_other_events_are_no_receipts(data, caplog):
    """They are answered like receipts: an error would make Meta repeat them, and in the end turn the webhook off."""
    assert read(data) == []
    assert caplog.records == []


# Who signed it


def test_one_of_several_secrets_is_enough():
    """So a secret is changed without a gap."""
    body = json.dumps(event(change(status()))).encode()
    both = CloudReceipts([OTHER, SECRET])

    assert len(both.read(body, signed(body, SECRET))) == len(both.read(body, signed(body, OTHER))) == 1
    with pytest.raises(Unsigned):
        both.read(body, signed(body, "0" * 32))
    with pytest.raises(Unsigned):
        CloudReceipts(OTHER).read(body, signed(body, SECRET))


BODY = json.dumps(event(change(status()))).encode()
GOOD = signed(BODY)["x-hub-signature-256"]


def test_the_signature_is_of_the_bytes():
    """Checked against a digest that was computed elsewhere (`openssl dgst -sha256 -hmac key`)."""
    body = rb'{"object": "page", "name": "caf\u00e9"}'
    digest = "5e1202437e6a6d8c781254a2041ae8f929527a280de95a53acea03e0a2481198"

    assert CloudReceipts("key-of-16-letter").read(body, {"x-hub-signature-256": f"sha256={digest}"}) == []
    written_anew = json.dumps(json.loads(body), ensure_ascii=False).encode()
    with pytest.raises(Unsigned):
        CloudReceipts("key-of-16-letter").read(written_anew, {"x-hub-signature-256": f"sha256={digest}"})


@pytest.mark.parametrize(
    "forged",
    [
        None,
        "",
        "sha256=",
        GOOD[:-1],
        GOOD + "0",
        GOOD + " ",
        GOOD[:-1] + ("0" if GOOD[-1] != "0" else "1"),
        GOOD.removeprefix("sha256="),
        GOOD.replace("sha256", "sha1"),
        GOOD.upper(),
        f"{GOOD},{GOOD}",
        "sha256=" + hashlib.sha256(BODY).hexdigest(),
        signed(BODY, "")["x-hub-signature-256"],
        "sha256=é",
        "sha256=\ud800",
        "x" * 100_000,
    ],
)
def test_a_forged_signature_is_refused(forged):
    """Before anything of the body is looked at: it may be anything."""
    headers = {} if forged is None else {"x-hub-signature-256": forged}
    for body in (BODY, b"{", b"[" * 200_000):
        with pytest.raises(Unsigned) as caught:
            SOURCE.read(body, headers)
        assert caught.value.status == 401
        assert SECRET not in str(caught.value)


def test_a_changed_body_is_refused():
    """The signature of one body opens no other."""
    with pytest.raises(Unsigned):
        SOURCE.read(BODY.replace(b"sent", b"read"), signed(BODY))


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


JSON = json_values(
    "sent", "delivered", "read", "played", "failed", "messages", "whatsapp_business_account", WAMID, REFERENCE, "group",
    fields=[
        "object", "entry", "changes", "field", "value", "statuses", "id", "status", "timestamp", "errors", "code",
        "title", "message", "type", "recipient_type", "biz_opaque_callback_data",
    ],
)  # fmt: skip


ERRORS = st.lists(st.dictionaries(st.sampled_from(["code", "title", "message", "error_data"]), JSON), min_size=1)
STATUS = st.fixed_dictionaries(
    {"status": st.sampled_from(["failed", "failed", "read", "deleted"])},
    optional={"errors": st.one_of(ERRORS, JSON), "id": JSON, "timestamp": JSON, "biz_opaque_callback_data": JSON},
)


@given(
    st.one_of(
        JSON,
        st.builds(lambda value: event() | {"entry": value}, JSON),
        st.builds(lambda value: event(change() | {"value": value}), JSON),
        st.builds(lambda values: event(change(*values)), st.lists(JSON)),
        st.builds(lambda fields: event(change(*(status() | each for each in fields))), st.lists(STATUS, min_size=1)),
    )
)
def test_any_json_is_receipts_or_refused(data):
    """No other error leaves the parser, and each receipt is one that can be recorded."""
    try:
        receipts = read(data)
    except UnreadableReceipts:
        assert not isinstance(data, dict)
        return
    for receipt in receipts:
        assert receipt.event in RECEIPT_EVENTS
        assert all(text is None or text.isprintable() for text in (receipt.reason, receipt.code))
        assert receipt.reason is None or len(receipt.reason) <= 1000


# The handshake


def query(**fields) -> dict[str, str]:
    given = {"mode": "subscribe", "verify_token": "vibecoding", "challenge": "1158201444"} | fields
    return {f"hub.{name}": value for name, value in given.items() if value is not None}


def test_the_handshake_gives_the_challenge_back():
    """To whoever knows the token."""
    assert SOURCE.challenge(query()) == "1158201444"


@pytest.mark.parametrize(
    "asked",
    [
        {},
        query(mode=None),
        query(mode="unsubscribe"),
        query(verify_token=None),
        query(verify_token=""),
        query(verify_token="vibecodin"),
        query(verify_token="vibecoding "),
        query(verify_token="Vibecoding"),
        query(verify_token="é"),
        query(verify_token="\ud800"),
        query(challenge=None),
        query(challenge=""),
    ],
)
def test_a_handshake_of_a_stranger_is_refused(asked):
    """With 403, as Meta wants it answered."""
    with pytest.raises(WrongToken) as caught:
        SOURCE.challenge(asked)

    assert caught.value.status == 403
    assert isinstance(caught.value, Unsigned)
    assert "vibecoding" not in str(caught.value)


@pytest.mark.parametrize("token", ["", "None", "vibecoding", None])
def test_without_a_token_each_handshake_is_refused(token):
    """A token that was not set is not the empty one."""
    with pytest.raises(WrongToken):
        CloudReceipts(SECRET).challenge(query(verify_token=token))


# Secrets


@pytest.mark.parametrize("secret", ["", " ", "short", "x" * 15, f"{SECRET}\n", f" {SECRET}", f"{SECRET} {OTHER}", 7])
def test_a_weak_or_broken_secret_is_refused_at_once(secret):
    """With an empty one anybody could sign; with a line end nobody could."""
    for given_secret in ([secret], [SECRET, secret]):
        with pytest.raises(ValueError, match=r"^app_secret: must be text of 16 characters or more without blanks$"):
            CloudReceipts(given_secret)


@pytest.mark.parametrize("none", [[], (), None])
def test_no_secret_at_all_is_refused(none):
    """Otherwise nothing could ever be received."""
    with pytest.raises(ValueError, match=r"^app_secret: none is given$"):
        CloudReceipts(none)


@pytest.mark.parametrize("token", ["", "  ", 7])
def test_an_empty_token_is_refused_at_once(token):
    """It would be everybody's."""
    with pytest.raises(ValueError, match=r"^verify_token: "):
        CloudReceipts(SECRET, token)


def test_no_secret_and_no_person_is_shown():
    """Neither in a repr nor in an error."""
    shown = repr(SOURCE) + repr(receipts_of(FAILED, status()))

    assert not [word for word in (SECRET, "vibecoding", NUMBER, WAMID) if word in shown]


# Whom not to ask again


def test_two_codes_say_not_to_send_again():
    """The business's own block, and an opt-out of marketing. 131026 is not one: it has reasons that pass."""
    for_good = {code.code for code in CODES if is_unreachable_for_good(code.code)}

    assert for_good == {130403, 131050}
    assert is_unreachable_for_good("131050")
    assert not any(map(is_unreachable_for_good, [None, "", "131026", 131026, "131049", "999999", "1310500"]))


def test_the_name_in_a_receipt_is_the_name_of_the_source():
    """Which a host gives to `engagement receive --provider`."""
    assert {receipt.provider for receipt in receipts_of(FAILED, status())} == {SOURCE.name} == {"cloud"}


def test_a_receipt_that_names_no_message_is_none():
    """Without an id and a reference of ours it cannot be matched."""
    with pytest.raises(InvalidMessage):
        Receipt(event="read", at=AT, provider="cloud")
    assert receipts_of({"status": "read", "timestamp": "1"}) == []
