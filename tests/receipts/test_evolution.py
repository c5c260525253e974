"""The receipts of Evolution API."""

import base64
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from engagement.messages import Receipt
from engagement.receipts.evolution import EvolutionReceipts
from engagement.receipts.sources import UnreadableReceipts, Unsigned
from receipts.gateway_webhooks import (
    JUNK,
    MALFORMED,
    NOW,
    NUMBER,
    OLD_SECRET,
    OURS,
    SECRET,
    a_clock,
    as_json,
    check_hostile,
    check_secrets,
    evolution,
    mangled,
    sent,
    token,
    update,
)

AUTHORIZATION = f"Bearer {SECRET}"
PROVEN = {"authorization": AUTHORIZATION}
SOURCE = EvolutionReceipts(authorization=AUTHORIZATION, now=a_clock)
LATER_NUMBER = "the gateway leaves out the number of the error"
META_ID = "wamid.HBgNNTUxMTk5OTk5OTk5ORUCABEYEjk4QUI3"


def read(event, data, **headers):
    """Return the receipts of an event."""
    return list(SOURCE.read(as_json(evolution(event, data)), PROVEN | headers))


def ours(event, at=NOW, message_id=OURS, **fields):
    """Return the receipt of our message."""
    return Receipt(event=event, at=at, provider="evolution", provider_message_id=message_id, **fields)


@pytest.mark.parametrize(
    ("state", "number", "event"),
    [
        ("SERVER_ACK", 2, "accepted"),
        ("DELIVERY_ACK", 3, "delivered"),
        ("READ", 4, "read"),
        ("PLAYED", 5, "read"),
    ],
)
def test_a_state_of_our_message_is_a_receipt(state, number, event):
    """Each state says so much of our own WhatsApp id, in words or as Baileys' number."""
    assert read("messages.update", update(state)) == read("messages.update", update(number)) == [ours(event)]


@pytest.mark.parametrize("state", ["ERROR", 0])
def test_a_refusal_of_whatsapp_s_is_undeliverable(state):
    """The gateway passes no number of WhatsApp's on, and the reason says so."""
    assert read("messages.update", update(state)) == [
        ours("undeliverable", reason=f"WhatsApp refused it; {LATER_NUMBER}")
    ]


@pytest.mark.parametrize("state", ["PENDING", 1, "DELETED", "", "SENT", "FAILED", 6, -1, 10**30])
def test_other_states_say_nothing(state):
    """PENDING is the gateway's own, DELETED stood for an update without a state, and Meta's words are not Baileys'."""
    assert read("messages.update", update(state)) == []


def test_an_update_without_a_state_says_nothing():
    """Before 2.3 an update of something else (a vote) has no status at all."""
    data = update("READ")
    del data["status"]

    assert read("messages.update", data) == []


def test_an_edit_is_no_proof_that_whatsapp_has_the_message():
    """In 2.3.7 an update without a state is called SERVER_ACK, also one that the gateway made itself; a vote is not."""
    edit = {"editedMessage": {"message": {"conversation": "Oi"}}}

    assert read("messages.update", update("SERVER_ACK", message=edit)) == []
    assert read("messages.update", update("READ", message=edit)) == [ours("read")]
    assert read("messages.update", update("SERVER_ACK", pollUpdates=[{"name": "Yes", "voters": []}])) == [
        ours("accepted")
    ]


@pytest.mark.parametrize("from_me", [False, None, "true", 1])
def test_messages_of_others_are_none_of_ours(from_me):
    """A state of a message that somebody sent us is no receipt of ours."""
    assert read("messages.update", update("READ", fromMe=from_me)) == []
    assert read("send.message", sent(key={"id": OURS, "fromMe": from_me})) == []


@pytest.mark.parametrize(
    ("word", "event"),
    [("SENT", "accepted"), ("DELIVERED", "delivered"), ("READ", "read"), ("PLAYED", "read")],
)
def test_meta_s_words_are_read_though_they_are_said_to_be_another_s(word, event):
    """The channel of Meta compares the person's number with our phone number's id, so that `fromMe` is never true."""
    data = update(word, keyId=META_ID, fromMe=False)

    assert read("messages.update", data) == [ours(event, message_id=META_ID)]
    assert read("messages.update", data | {"status": "SERVER_ACK"}) == []


def test_meta_s_failure_is_undeliverable():
    """The gateway drops Meta's `errors`."""
    assert read("messages.update", update("FAILED", keyId=META_ID, fromMe=False)) == [
        ours("undeliverable", message_id=META_ID, reason=f"Meta failed to deliver it; {LATER_NUMBER}")
    ]


def test_what_was_sent_was_accepted():
    """`send.message` says what the answer to the send says; its time is in seconds."""
    assert read("send.message", sent()) == [ours("accepted", at=datetime.fromtimestamp(1772366390, UTC))]
    assert read("send.message", sent(status="ERROR")) == read("send.message", sent(status=0)) == []


def test_a_send_without_a_time_was_accepted_now():
    """An instance of another kind may leave it out."""
    data = sent()
    del data["messageTimestamp"]

    assert read("send.message", data) == [ours("accepted")]


def test_the_time_is_the_gateway_s_if_it_tells_it():
    """2.4 tells the milliseconds in a header, and repeats it. `date_time` is three hours off and not believed."""
    in_the_header = datetime(2026, 3, 1, 11, 59, 58, 123000, tzinfo=UTC)

    assert read("messages.update", update("READ"), **{"x-timestamp": "1772366398123"}) == [
        ours("read", at=in_the_header)
    ]
    for other in ("", "1772366398", "٣" * 13, "99999999999999", "yesterday"):
        assert read("messages.update", update("READ"), **{"x-timestamp": other}) == [ours("read")]


@pytest.mark.parametrize("event", ["messages.upsert", "messages.delete", "connection.update", "MESSAGES_UPDATE", ""])
def test_other_events_are_no_receipts(event):
    """They are read no further."""
    assert read(event, [7]) == []


# The proof


@pytest.mark.parametrize(
    "given",
    [
        "",
        AUTHORIZATION[:-1],
        AUTHORIZATION + "x",
        AUTHORIZATION.lower(),
        SECRET,
        "Bearer",
        "Bearer ..",
        "\ud800",
        "Bearer é.é.é",
    ],
)
def test_a_wrong_header_is_unsigned(given):
    """Only the whole header counts, and it is looked at before the body."""
    for source in (
        SOURCE,
        EvolutionReceipts(jwt_key=SECRET),
        EvolutionReceipts(authorization=AUTHORIZATION, jwt_key=OLD_SECRET),
    ):
        for body in (as_json(evolution("messages.update", update("READ"))), b"{"):
            with pytest.raises(Unsigned, match=r"^the header authorization is missing or wrong$"):
                source.read(body, {"authorization": given})
    with pytest.raises(Unsigned):
        SOURCE.read(b"{", {"apikey": AUTHORIZATION})


def test_the_header_is_changed_without_a_gap():
    """The old and the new one are both taken, and so is that of a URL with a user and a password."""
    basic = f"Basic {base64.b64encode(f'engagement:{SECRET}'.encode()).decode()}"
    source = EvolutionReceipts(authorization=[AUTHORIZATION, basic], jwt_key=OLD_SECRET, now=a_clock)
    body = as_json(evolution("messages.update", update("READ")))

    for header in (AUTHORIZATION, basic, token(OLD_SECRET)):
        assert list(source.read(body, {"authorization": header})) == [ours("read")]


def with_token(given):
    """Return the receipts of an event that comes with a token."""
    source = EvolutionReceipts(jwt_key=[OLD_SECRET, SECRET], now=a_clock)
    return list(source.read(as_json(evolution("messages.update", update("READ"))), {"authorization": given}))


@pytest.mark.parametrize("key", [SECRET, OLD_SECRET])
def test_a_token_of_the_gateway_is_a_proof(key):
    """By any of the keys."""
    assert with_token(token(key)) == [ours("read")]


@pytest.mark.parametrize("age", [timedelta(minutes=59), timedelta(minutes=11), timedelta(minutes=-59)])
def test_a_token_counts_for_an_hour(age):
    """The gateway repeats a request for half an hour with the token of its first try, which says ten minutes."""
    assert with_token(token(SECRET, iat=int((NOW - age).timestamp()))) == [ours("read")]


@pytest.mark.parametrize(
    "claims",
    [
        {"iat": int((NOW - timedelta(minutes=61)).timestamp())},
        {"iat": int((NOW + timedelta(minutes=61)).timestamp())},
        {"iat": None},
        {"iat": True},
        {"iat": str(int(NOW.timestamp()))},
        {"iat": 10**400},
        {"app": "other"},
        {"action": "login"},
    ],
)
def test_a_token_of_another_time_or_use_is_no_proof(claims):
    """An old one may have been stolen; one for another use was not made for us."""
    with pytest.raises(Unsigned):
        with_token(token(SECRET, **claims))


def test_a_token_that_signs_itself_is_no_proof():
    """The algorithm is ours: `none`, no signature, another's key and changed claims are all wrong."""
    head, said, signed = token(SECRET).removeprefix("Bearer ").split(".")
    none = base64.urlsafe_b64encode(b'{"alg":"none"}').rstrip(b"=").decode()
    newer = token(SECRET, iat=int(NOW.timestamp()) + 1).split(".")[1]
    for forged in (
        f"{none}.{said}.",
        f"{head}.{said}.",
        f"{none}.{said}.{signed}",
        f"{head}.{newer}.{signed}",
        f"{said}.{signed}",
    ):
        with pytest.raises(Unsigned):
            with_token(f"Bearer {forged}")
    with pytest.raises(Unsigned):
        with_token(token("another key, which is long enough"))
    with pytest.raises(Unsigned):
        with_token(token(SECRET).replace("Bearer", "Basic"))


def test_a_source_has_a_secret():
    """It is checked when the source is made, and never shown."""
    with pytest.raises(ValueError, match=r"^authorization: is missing, and jwt_key too"):
        EvolutionReceipts()
    check_secrets(lambda given: EvolutionReceipts(authorization=given), "authorization", 16)
    check_secrets(lambda given: EvolutionReceipts(jwt_key=given), "jwt_key", 16)


# Bodies that no gateway sends


@pytest.mark.parametrize("body", MALFORMED)
def test_a_malformed_body_is_refused(body):
    """With one kind of error, which holds nothing of the body."""
    with pytest.raises(UnreadableReceipts) as caught:
        SOURCE.read(body, PROVEN)
    assert caught.value.status == 400
    assert caught.value.__context__ is None


@pytest.mark.parametrize(
    ("event", "data"),
    [
        ("messages.update", None),
        ("messages.update", [update("READ")]),
        ("messages.update", update("READ", keyId=None)),
        ("messages.update", update("READ", keyId="")),
        ("messages.update", update("READ", keyId=f"{NUMBER}\n")),
        ("messages.update", update("READ", keyId="a" * 513)),
        ("messages.update", update(True)),
        ("messages.update", update(2.0)),
        ("messages.update", update(["READ"])),
        ("send.message", {}),
        ("send.message", sent(key={"fromMe": True})),
        ("send.message", sent(messageTimestamp="1772366390")),
        ("send.message", sent(messageTimestamp=True)),
        ("send.message", sent(messageTimestamp=10**12)),
        ("send.message", sent(messageTimestamp=-(10**30))),
    ],
)
def test_a_receipt_with_a_part_of_a_wrong_kind_is_refused(event, data):
    """Nothing is guessed."""
    with pytest.raises(UnreadableReceipts) as caught:
        read(event, data)
    assert NUMBER not in str(caught.value)


@given(mangled(evolution("messages.update", update("READ"))) | mangled(evolution("send.message", sent())))
def test_a_mangled_body_has_no_other_error(body):
    """One place of it holds anything at all."""
    check_hostile(lambda: SOURCE.read(as_json(body), PROVEN))


@given(JUNK.map(as_json) | st.binary(max_size=200), st.text(max_size=60))
def test_any_bytes_have_no_other_error(body, header):
    """Nor has any header."""
    check_hostile(lambda: SOURCE.read(body, PROVEN | {"x-timestamp": header}))
    with pytest.raises(Unsigned):
        EvolutionReceipts(jwt_key=SECRET).read(body, {"authorization": f"Bearer {header}"})
