"""A transport that gets the words with each message."""

import json
import re
from dataclasses import fields

import pytest
from conftest import new_message, outgoing, queue, row
from far import Far, fails

from engagement import NotSent, OutgoingMessage, Refused, Sent, process_message_queue
from engagement.transports.cloud import Template, WhatsAppCloud
from engagement.transports.dialects import WAHA
from engagement.transports.gateway import WhatsAppGateway
from engagement.transports.rendering import words_of
from engagement.transports.webhook import Webhook
from engagement.words import FluentRenderer, Rendered, speaking


def locale_param(message):
    return message.message_params["locale"]


def test_a_transport_gets_the_words(engine):
    """`Rendered` gives each message with its text, in the person's language, and changes nothing else in it."""
    queue(
        engine,
        new_message("ana", message_params={"name": "Ana", "days": 1, "locale": "pt-BR"}),
        new_message("ben", message_params={"name": "Ben", "days": 3, "locale": "en-GB"}),
    )
    sent = {}

    process_message_queue(engine, Rendered(lambda m: sent.update({m.user_id: m}), FluentRenderer(), locale_param))

    assert sent["ana"].text.startswith("Oi, Ana! Faz um dia que")
    assert sent["ben"].text.startswith("Hi Ben, we have not heard from you for 3 days,")
    assert (
        sent["ana"].delivery_id
        == OutgoingMessage(
            **{field.name: getattr(sent["ana"], field.name) for field in fields(OutgoingMessage)}
        ).delivery_id
    )
    assert "Ana" not in repr(sent["ana"])
    assert len({sent["ana"], sent["ben"]}) == 2


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"message_key": "goodbye.no_such"}, "no words: goodbye-no_such is in no catalogue for pt-BR"),
        ({"message_key": "good bye"}, "no words: the message key is no key"),
        (
            {"message_params": {"locale": "pt-BR", "days": 3}},
            "no words: goodbye-14_days in pt-BR: Unknown external: name",
        ),
        (
            {"message_params": {"locale": "pt-BR", "days": [3], "name": "Zoraide"}},
            "no words: goodbye-14_days in pt-BR: ",
        ),
    ],
)
def test_what_cannot_be_said_is_refused_before_the_send(engine, fields, reason):
    """A missing key or parameter fails the message at once, with the reason in its history, and nothing is sent."""
    given = {"message_params": {"name": "Zoraide", "days": 3, "locale": "pt-BR"}} | fields
    (message_id,) = queue(engine, new_message(**given))
    sent = []

    process_message_queue(engine, Rendered(sent.append, FluentRenderer(), locale_param))

    found = row(engine, message_id)
    assert (sent, found.status, found.history[-1]["event"]) == ([], "failed", "refused")
    assert found.history[-1]["reason"].startswith(reason)
    assert "Zoraide" not in found.error_message


@pytest.mark.parametrize(
    ("renderer", "locale_of", "outcome"),
    [
        (lambda *_: "Hi", lambda _: "en", Sent("far")),
        (lambda *_: " \n\u200b", lambda _: "en", Refused("no words: goodbye.14_days is empty in en")),
        (lambda *_: None, lambda _: "en", Refused("no words: goodbye.14_days is empty in en")),
        (lambda *_: {}["x"], lambda _: "en", NotSent("Rendered raised KeyError")),
        (lambda *_: "Hi", fails, NotSent("Rendered raised LocaleUnknown")),
        (lambda *_: "Hi", lambda _: {}["x"], NotSent("Rendered raised LocaleUnknown")),
        (lambda *_: "Hi", lambda _: None, NotSent("Rendered raised LocaleUnknown")),
    ],
)
def test_any_function_renders_and_a_look_up_that_fails_is_not_sent(renderer, locale_of, outcome):
    """A host's own renderer is held to the same: nothing empty leaves, and what may work later is tried again."""
    far = Far()

    assert Rendered(far, renderer, locale_of).send(outgoing()) == outcome
    assert [message.text for message in far.sent] == (["Hi"] if outcome == Sent("far") else [])


def test_rendered_keeps_what_the_transport_can_do():
    """`look_up`, `ready` and `idempotent` of the transport are kept."""
    far = Far(found=Sent("x"))
    rendered = Rendered(far, lambda *_: "Hi", lambda _: "en")

    assert rendered.look_up(outgoing()) == Sent("x")
    assert (rendered.ready(), rendered.idempotent) == (False, True)


@pytest.mark.parametrize(
    ("locale_of", "key", "kind"),
    [
        (lambda _: "en", "goodbye.14_days", str),
        (lambda _: "en", "no.such", Refused),
        (lambda _: {}["x"], "goodbye.14_days", NotSent),
    ],
)
def test_our_transports_take_speaking_as_their_render(locale_of, key, kind):
    """What cannot be said is refused by the transport itself; a locale that cannot be looked up is tried again."""
    say = speaking(FluentRenderer(), locale_of)
    message = outgoing(message_key=key, message_params={"name": "Ana", "days": 3})

    assert isinstance(words_of(say, message), kind)


STEERING = [*map(chr, range(9)), "\x0b", "\x1b", "\x7f", "\x85", "\x9b", *map(chr, range(0x202A, 0x202F))]
ISOLATES = ["\u2066", "\u2067", "\u2068", "\u2069", "\u2069\u2067", "\u2067\u2067\u2069"]
TURNING = [*STEERING, *ISOLATES, "\u061c", "\u200e", "\u200f"]


@pytest.mark.parametrize("mark", TURNING)
def test_a_name_turns_nothing_around(mark):
    """What a name holds besides its letters does nothing to the sentence around it."""
    text = FluentRenderer()("goodbye.14_days", {"name": f"A{mark}na", "days": 3}, "en")

    assert text.startswith("Hi Ana,")


@pytest.mark.parametrize(
    "name",
    ["Ana\u200d\U0001f469\u200d\U0001f466", "\u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645", "A\nB\tC", "e\u0301"],
)
def test_a_name_keeps_what_joins_its_letters(name):
    """Joiners and accents are part of a name, and lines and tabs of a list that is a parameter."""
    assert FluentRenderer()("goodbye.14_days", {"name": name, "days": 3}, "en").startswith(f"Hi {name},")


def sent_by(render):
    """Return what each transport of ours would send of what `render` says."""
    rendered = Far()
    Rendered(rendered, lambda *_: render(None), lambda _: "en").send(outgoing())
    yield rendered.sent[0].text
    gateway = WhatsAppGateway(url="http://127.0.0.1:1", key="key", render=render, dialect=WAHA)
    yield json.loads(gateway.prepare(outgoing()).body)["text"]
    webhook = Webhook(url="http://127.0.0.1:1", render=render)
    yield json.loads(webhook.prepare(outgoing()).body)["text"]
    cloud = WhatsAppCloud(phone_number_id="1", token="token", render=render)
    yield json.loads(cloud.prepare(outgoing()).body)["text"]["body"]
    parameter = {"type": "text", "text": render(None)}
    template = Template("hi", "en", [{"type": "body", "parameters": (parameter,)}])
    cloud = WhatsAppCloud(phone_number_id="1", token="token", render=lambda _: template)
    (component,) = json.loads(cloud.prepare(outgoing()).body)["template"]["components"]
    yield component["parameters"][0]["text"]


@pytest.mark.parametrize("mark", [*STEERING, *ISOLATES])
def test_a_name_in_a_host_s_own_words_turns_nothing_around(mark):
    """Of a host's own renderer only the words are known: no control in them is kept, and no isolate is left open."""
    for text in sent_by(lambda _: f"Hi A{mark}na, how are you?"):
        assert not re.search("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]", text)
        assert text.count("\u2069") == sum(map(text.count, "\u2066\u2067\u2068"))
        assert re.sub("[\u2066-\u2069]", "", text) == "Hi Ana, how are you?"


@pytest.mark.parametrize(
    "words", ["Hi \u2068Ana\u2069!", "\u2067a \u2066b\u2069 c\u2069", "a\nb\tc", "\u200fx\u200e\u061c", "\u200d"]
)
def test_what_a_host_s_words_need_is_kept(words):
    """Fluent's own isolates, nested ones, marks of a direction, lines and joiners are sent as they are."""
    assert set(sent_by(lambda _: f"{words}.")) == {f"{words}."}


def test_an_async_renderer_is_refused_at_once():
    """A coroutine is no text."""

    async def later(*_):
        return "Hi"

    with pytest.raises(TypeError, match="renderer"):
        speaking(later, lambda _: "en")
    with pytest.raises(TypeError, match="locale_of"):
        speaking(lambda *_: "Hi", later)
