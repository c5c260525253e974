"""The receipts of WAHA."""

from datetime import UTC, datetime

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engagement.messages import Receipt
from engagement.receipts.sources import UnreadableReceipts, Unsigned
from engagement.receipts.waha import WahaReceipts
from engagement.transports.dialects import WAHA
from receipts.gateway_webhooks import (
    JUNK,
    MALFORMED,
    NOW,
    NUMBER,
    OLD_SECRET,
    OURS,
    SECRET,
    a_clock,
    ack,
    as_json,
    check_hostile,
    check_secrets,
    mangled,
    waha_headers,
)

SOURCE = WahaReceipts(key=SECRET, now=a_clock)
GROUP = "120363041234567890@g.us"
AT = datetime(2026, 3, 1, 11, 59, 58, 123000, tzinfo=UTC)


def read(event):
    """Return the receipts of an event."""
    body = as_json(event)
    return list(SOURCE.read(body, waha_headers(body)))


def ours(event, at=AT, **fields):
    """Return the receipt of our message."""
    return Receipt(event=event, at=at, provider="waha", provider_message_id=OURS, **fields)


@pytest.mark.parametrize("engine", ["NOWEB", "WEBJS", "GOWS", "WPP"])
@pytest.mark.parametrize(("number", "event"), [(1, "accepted"), (2, "delivered"), (3, "read"), (4, "read")])
def test_an_acknowledgement_of_our_message_is_a_receipt(engine, number, event):
    """Whichever engine says it; the time is the event's, in milliseconds."""
    assert read(ack(number, engine)) == [ours(event)]


@pytest.mark.parametrize("number", [0, 5, -2, 10**30])
def test_other_acknowledgements_say_nothing(number):
    """0 is the gateway's own."""
    assert read(ack(number)) == []


def test_an_acknowledgement_that_the_engine_does_not_know_says_nothing():
    """JSON leaves out its number."""
    event = ack(2)
    del event["payload"]["ack"]

    assert read(event) == []


@pytest.mark.parametrize("engine", ["NOWEB", "WEBJS", "WPP"])
def test_a_refusal_is_undeliverable(engine):
    """Without WhatsApp's number, as before 2026 and by WEBJS. Words of WEBJS's may name a person and are left out."""
    event = ack(-1, engine, error="no such user 5511999999999")

    assert read(event) == [ours("undeliverable", reason="WhatsApp refused it")]


@pytest.mark.parametrize(
    ("code", "reason"),
    [
        ("463", "WhatsApp refused it: the sender is locked out of new chats, or lacks a token of this contact"),
        ("479", "WhatsApp refused it as malformed, mostly for a stale session of a device"),
        ("420", "WhatsApp refused it"),
        ("503", "WhatsApp refused it"),
    ],
)
def test_a_refusal_has_whatsapp_s_number(code, reason):
    """NOWEB adds it since 2026."""
    error = {"code": code, "blocked": code == "463", "until": None}

    assert read(ack(-1, error=error)) == [ours("undeliverable", reason=reason, code=code)]


@pytest.mark.parametrize("code", ["500", "501", "599"])
def test_an_error_after_which_whatsapp_may_have_acted_says_nothing(code):
    """As in the answer to a send."""
    assert read(ack(-1, error={"code": code})) == []


@pytest.mark.parametrize("code", [463, None, "", "4 63", f"463 {NUMBER}", "٤٦٣", "123456"])
def test_another_number_is_left_out(code):
    """It may hold anything."""
    assert read(ack(-1, error={"code": code})) == [ours("undeliverable", reason="WhatsApp refused it")]


@pytest.mark.parametrize("engine", ["GOWS", "NEW", None, ["NOWEB"]])
def test_an_error_of_an_engine_that_means_something_else_says_nothing(engine):
    """GOWS makes it of whatsmeow's `server-error`: a device has the message, and asks for its file once more."""
    assert read(ack(-1, engine)) == []


def test_messages_of_others_are_none_of_ours():
    """The id says whose it is."""
    assert read(ack(3, id=f"false_{NUMBER}@c.us_{OURS}", fromMe=False)) == []


@pytest.mark.parametrize(
    "said",
    [f"true_{GROUP}_{OURS}_5511888888888@c.us", f"true_{GROUP}_{OURS}_98765432101234@lid", f"true_{GROUP}_{OURS}"],
)
def test_members_of_a_group_read_our_message(said):
    """WEBJS calls it somebody else's (`fromMe: false`), and keeps the id right."""
    fields = {"id": said, "from": GROUP, "participant": f"{NUMBER}@c.us", "fromMe": False}

    assert read(ack(3, "WEBJS", "message.ack.group", **fields)) == [ours("read")]


@pytest.mark.parametrize("own", ["5511888888888@c.us", "5511888888888:7@s.whatsapp.net", "98765432101234@lid"])
def test_our_own_phone_is_no_reader(own):
    """In a group NOWEB calls it READ that a device of the sender's took the message."""
    fields = {"id": f"true_{GROUP}_{OURS}_5511888888888@c.us", "participant": own}

    assert read(ack(3, "NOWEB", "message.ack.group", **fields)) == []


@pytest.mark.parametrize("me", [None, "5511888888888@c.us", {}, {"id": None}])
def test_a_session_that_does_not_name_itself_keeps_no_receipt_back(me):
    """While it connects, `me` is null."""
    event = ack(3, "NOWEB", "message.ack.group", participant=f"{NUMBER}@c.us")

    assert read(event | {"me": me}) == [ours("read")]


@pytest.mark.parametrize(
    "answer",
    [
        {"key": {"id": OURS, "remoteJid": f"{NUMBER}@s.whatsapp.net", "fromMe": True}, "status": "PENDING"},
        {"id": f"true_{NUMBER}@c.us_{OURS}"},
        {"id": {"_serialized": f"true_{NUMBER}@c.us_{OURS}"}},
    ],
)
@pytest.mark.parametrize("chat", [f"{NUMBER}@c.us", "12345678901234@lid"])
def test_a_receipt_names_the_message_as_the_transport_does(answer, chat):
    """Whatever engine answered the send, and whichever of its two addresses the person is under."""
    assert read(ack(2, id=f"true_{chat}_{OURS}"))[0].provider_message_id == WAHA.provider_id(answer) == OURS


def test_an_event_without_a_time_is_of_now():
    """Versions of 2024 tell none."""
    event = ack(2)
    del event["timestamp"]

    assert read(event) == [ours("delivered", at=NOW)]


@pytest.mark.parametrize("name", ["message", "message.any", "session.status", "message.ack.other", ""])
def test_other_events_are_no_receipts(name):
    """They are read no further."""
    assert read({"event": name, "payload": 7, "timestamp": "x"}) == []


# The proof


def test_a_forged_request_is_unsigned():
    """Another key, another body, half a signature, another algorithm or none: none is read, whatever it holds."""
    body = as_json(ack(2))
    good = waha_headers(body)
    forged = [
        waha_headers(body, OLD_SECRET),
        waha_headers(body + b" "),
        good | {"x-webhook-hmac": good["x-webhook-hmac"][:-1]},
        good | {"x-webhook-hmac": good["x-webhook-hmac"] + "0"},
        good | {"x-webhook-hmac": ""},
        good | {"x-webhook-hmac": "\ud800é"},
        good | {"x-webhook-hmac-algorithm": "sha256"},
        {name: value for name, value in good.items() if name != "x-webhook-hmac"},
        {name: value for name, value in good.items() if name != "x-webhook-hmac-algorithm"},
    ]
    for headers in forged:
        with pytest.raises(Unsigned, match=r"^the header x-webhook-hmac"):
            SOURCE.read(body, headers)
    with pytest.raises(Unsigned):
        SOURCE.read(b"{", good)


@pytest.mark.parametrize("key", [SECRET, OLD_SECRET])
def test_the_key_is_changed_without_a_gap(key):
    """The old and the new one are both taken."""
    body = as_json(ack(2))
    source = WahaReceipts(key=[OLD_SECRET, SECRET])

    assert list(source.read(body, waha_headers(body, key))) == [ours("delivered")]


def test_a_source_has_a_key():
    """It is checked when the source is made, and never shown."""
    check_secrets(lambda given: WahaReceipts(key=given), "key", 16)
    with pytest.raises(ValueError, match=r"^key: "):
        WahaReceipts(key=None)


# Bodies that no gateway sends


@pytest.mark.parametrize("body", MALFORMED)
def test_a_malformed_body_is_refused(body):
    """With one kind of error, which holds nothing of the body."""
    with pytest.raises(UnreadableReceipts) as caught:
        SOURCE.read(body, waha_headers(body))
    assert caught.value.status == 400
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    "event",
    [
        {"event": "message.ack"},
        ack(2) | {"payload": [1]},
        ack(2) | {"timestamp": None},
        ack(2) | {"timestamp": "1772366398123"},
        ack(2) | {"timestamp": 1772366398.123},
        ack(2) | {"timestamp": 10**30},
        ack(2) | {"timestamp": -(10**30)},
        ack(2) | {"timestamp": 10**15},
        ack("2"),
        ack(True),
        ack(2.0),
        ack(None),
        ack(2, id=None),
        ack(2, id={"_serialized": f"true_{NUMBER}@c.us_{OURS}"}),
        ack(2, id="true_" + "a" * 600),
        ack(2, id=f"true_{NUMBER}@c.us_\n"),
    ],
)
def test_a_receipt_with_a_part_of_a_wrong_kind_is_refused(event):
    """Nothing is guessed."""
    with pytest.raises(UnreadableReceipts) as caught:
        read(event)
    assert NUMBER not in str(caught.value)


@given(mangled(ack(2)) | mangled(ack(-1, error={"code": "463"})) | mangled(ack(3, participant=f"{NUMBER}@c.us")))
def test_a_mangled_body_has_no_other_error(event):
    """One place of it holds anything at all."""
    check_hostile(lambda: read(event))


@given(JUNK.map(as_json) | st.binary(max_size=200), st.text(max_size=60))
def test_any_bytes_have_no_other_error(body, header):
    """Nor has any header."""
    check_hostile(lambda: SOURCE.read(body, waha_headers(body)))
    with pytest.raises(Unsigned):
        SOURCE.read(body, waha_headers(body) | {"x-webhook-hmac": header})
