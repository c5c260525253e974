"""From a message's key and params to words in the person's language, or to a clear no, before anything is sent.

A person never sees a placeholder: a text that lacks a param is `Refused` ("Hi { $name }" without a name).
"""

from __future__ import annotations

import os
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from datetime import date, datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

from engagement._sending.protocols import Transport
from engagement.messages import OutgoingMessage
from engagement.outcomes import Outcome, Refused
from engagement.policies.gates import Gate, plain_function

if TYPE_CHECKING:
    from fluent.runtime import FluentBundle
    from fluent.runtime.resolver import Pattern

    from engagement._catalogues.catalogue import Catalogue

CATALOGUES = Path(__file__).parent / "catalogues"
"""The words of the demo: English and Brazilian Portuguese, and an example to start from."""

Renderer = Callable[[str, Mapping[str, Any], str], str]
"""`renderer(message_key, message_params, locale)` returns the text, or raises `NoWords`. It is called from several
threads at once."""

Words = TypeVar("Words")

_FLUENT_ID = re.compile(r"[a-zA-Z][a-zA-Z0-9_-]*")
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e]")
_ISOLATES = re.compile(r"[\u2066-\u2069]")
_END_OF_ISOLATE = "\u2069"
_DIRECTIONS = re.compile(r"[\u061c\u200e\u200f\u2066-\u2069]")


class NoWords(LookupError):  # noqa: N818 - an event
    """A message that cannot be said whole. The text names keys, locales and parameters, never their values."""


class LocaleUnknown(RuntimeError):  # noqa: N818 - an event
    """The host's `locale_of` failed or answered no text. Trying again may help."""


def speaking(renderer: Renderer, locale_of: Callable[[OutgoingMessage], str]) -> Callable[[OutgoingMessage], str]:
    """Return a function from a message to its text in the person's language. Our transports take it as `render`.

    For a message that cannot be said, or an empty text, it raises `NoWords`, which a transport answers with `Refused`.
    If `locale_of` fails it raises `LocaleUnknown`. That, and any other error of `renderer`, is `NotSent`.
    """
    plain_function("renderer", renderer)
    plain_function("locale_of", locale_of)

    def say(message: OutgoingMessage) -> str:
        try:
            locale = locale_of(message)
        except Exception as error:
            # A KeyError of the host's must not look like a message that cannot be said.
            raise LocaleUnknown(f"locale_of raised {type(error).__name__}") from error
        if not isinstance(locale, str):
            raise LocaleUnknown(f"locale_of answered {type(locale).__name__}, not text")
        text = without_controls(renderer(message.message_key, message.message_params, locale))
        if not isinstance(text, str) or not says_something(text):
            raise NoWords(f"{message.message_key} is empty in {locale}")
        return text

    return say


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class RenderedMessage(OutgoingMessage):
    """An `OutgoingMessage` with its words, for a transport inside `Rendered`."""

    text: str

    __hash__ = OutgoingMessage.__hash__


class Rendered(Gate):
    """Gives any transport inside each message with its `text`, in the person's language, as `speaking` finds it.

    A message that cannot be said is `Refused`, with the reason; a failing `locale_of` is `NotSent`. Nothing has left by
    then.
    """

    def __init__(self, transport: Transport, renderer: Renderer, locale_of: Callable[[OutgoingMessage], str]) -> None:
        super().__init__(transport)
        self._say = speaking(renderer, locale_of)

    def check(self, message: OutgoingMessage) -> OutgoingMessage | Outcome:
        """Return the message with its words."""
        try:
            text = self._say(message)
        except NoWords as error:
            return Refused(f"no words: {error}")
        given = {field.name: getattr(message, field.name) for field in fields(OutgoingMessage)}
        return RenderedMessage(**given, text=text)


def says_something(text: str) -> bool:
    """Whether a person would see anything: spaces and invisible characters are nothing."""
    return any(character.isprintable() and not character.isspace() for character in text)


def without_controls(words: Words) -> Words:
    """Return text, and text inside of JSON, without characters that act on the words around them.

    A name may hold control characters other than ends of lines and tabs, marks that turn a text around (`U+202A` to
    `U+202E`), and isolates that are not closed. Closed isolates, such as Fluent's own, are kept.
    See docs/decisions.md#2026-11-29--what-a-name-holds-besides-letters-is-left-out-and-the-message-is-sent.
    """
    cleaned: Any = words
    match words:
        case str():
            cleaned = _with_closed_isolates(_CONTROLS.sub("", words))
        case Mapping():
            cleaned = {key: without_controls(value) for key, value in words.items()}
        case list() | tuple():
            cleaned = [without_controls(value) for value in words]
    return cast("Words", cleaned)


def _with_closed_isolates(text: str) -> str:
    opened: list[int] = []
    alone: set[int] = set()
    for mark in _ISOLATES.finditer(text):
        if mark[0] != _END_OF_ISOLATE:
            opened.append(mark.start())
        elif opened:
            opened.pop()
        else:
            alone.add(mark.start())
    alone.update(opened)
    return "".join(letter for place, letter in enumerate(text) if place not in alone) if alone else text


def fluent_id(message_key: str) -> str:
    """Return the id of a key in the catalogues: each dot becomes a hyphen, and nothing else changes.

    >>> fluent_id("goodbye.14_days")
    'goodbye-14_days'

    Raises `NoWords` if that is no id: a letter, then letters, digits, `_` and `-`.
    """
    name = message_key.replace(".", "-")
    if not _FLUENT_ID.fullmatch(name):
        raise NoWords("the message key is no key of a catalogue: a letter, then letters, digits, '.', '_' and '-'")
    return name


class FluentRenderer:
    """Renders with Project Fluent, from the catalogues in `path`: `<locale>/*.ftl`. Needs the extra `words`.

    A text is looked for in the locale asked for, in each shorter form of it, and in `default`: `pt-BR`, `pt`, `en`.
    `fallbacks` puts others in between: `{"pt": ["pt-BR"]}` gives a person from Portugal Brazilian words rather than
    English ones. Case and `_` for `-` do not matter. A locale without a catalogue gets the default.

    Numbers are given as JSON numbers, true and false as the words for variants, and dates as ISO 8601 text that the
    catalogue declares to be a date: `{ DATETIME($day, dateStyle: "long") }`. A time is shown in its own offset.

    The texts of `default` are parsed at once, all others at their first use. Thread-safe. Raises `ValueError` if a text
    of `default` cannot be parsed, or if there is no catalogue for it. A broken text of another locale raises
    `BrokenCatalogue` at its use, which is `NotSent` to a transport: somebody may mend it.
    """

    def __init__(
        self,
        path: Path | str = CATALOGUES,
        *,
        default: str = "en",
        fallbacks: Mapping[str, Sequence[str]] | None = None,
    ) -> None:
        from engagement._catalogues.catalogue import read_catalogues
        from engagement._catalogues.locales import Chain, tag_of

        if not Path(path).is_dir():
            raise ValueError("catalogues: the path is no folder")
        catalogues = read_catalogues(path)
        self._chain = Chain(catalogues, default, fallbacks)
        self._voices = {tag_of(locale): _Voice(catalogue) for locale, catalogue in catalogues.items()}
        for catalogue in catalogues.values():
            if tag_of(catalogue.locale) == tag_of(default):
                catalogue.messages  # noqa: B018 - parses them all
        unreadable = [str(problem) for catalogue in catalogues.values() for problem in catalogue.problems]
        if unreadable:
            raise ValueError(f"catalogues: {'; '.join(unreadable)}")
        if tag_of(default) not in self._voices:
            raise ValueError(f"default: there is no catalogue for {default}")

    def __call__(self, message_key: str, message_params: Mapping[str, Any], locale: str) -> str:
        """Return the text, or raise `NoWords`."""
        name = fluent_id(message_key)
        for tag in self._chain.of(locale):
            if self._voices[tag].knows(name):
                return self._voices[tag].say(name, message_params)
        raise NoWords(f"{name} is in no catalogue for {locale}")


def __getattr__(name: str) -> Any:
    """Make `render` when it is asked for, so that broken catalogues stop a command before anything is claimed.

    For hosts that only configure: `ENGAGEMENT_RENDER=engagement.words:render` says each message from the catalogues in
    ENGAGEMENT_CATALOGUES (default: the demo's), in the locale that its params name as `locale` (default: English).
    """
    if name != "render":
        raise AttributeError(f"module {__name__} has no attribute {name}")
    renderer = FluentRenderer(os.environ.get("ENGAGEMENT_CATALOGUES") or CATALOGUES)
    return speaking(renderer, lambda message: message.message_params.get("locale", ""))


class _Voice:
    """One locale's catalogue, ready to speak."""

    def __init__(self, catalogue: Catalogue) -> None:
        self._locale = catalogue.locale
        self._catalogue = catalogue
        self._faults: dict[str, list[str]] = {}
        self._preparing = threading.Lock()

    def knows(self, name: str) -> bool:
        return name in self._catalogue

    @cached_property
    def _bundle(self) -> FluentBundle:
        from fluent.runtime import FluentBundle

        # Isolation marks would stay in a text that a person copies out of a chat.
        return FluentBundle([self._locale], functions={"DATETIME": _datetime}, use_isolating=False)

    def _prepare(self, name: str) -> None:
        """Parse a text and the texts that it refers to, or raise `BrokenCatalogue`."""
        from fluent.syntax import ast

        from engagement._catalogues.needs import needs_of

        with self._preparing:
            # Fluent shows some faults to the person without calling them errors. So look for them first.
            faults = needs_of(self._catalogue, name).faults
            self._bundle.add_resource(ast.Resource([*self._catalogue.parsed_since()]))
            self._faults[name] = faults

    def say(self, name: str, params: Mapping[str, Any]) -> str:
        if name not in self._faults:
            self._prepare(name)
        if self._faults[name]:
            raise NoWords(f"{name} in {self._locale} {'; '.join(self._faults[name])}")
        pattern = cast("Pattern", self._bundle.get_message(name).value)
        try:
            text, errors = self._bundle.format_pattern(pattern, {key: _value(params[key]) for key in params})
        except Exception as error:  # noqa: BLE001 - with any error the text is not whole
            errors, text = [error], ""
        if errors:
            raise NoWords(f"{name} in {self._locale}: {'; '.join(map(_without_values, errors))}") from None
        if not isinstance(text, str) or not says_something(text):
            raise NoWords(f"{name} in {self._locale} is empty")
        return text


def _value(value: Any) -> Any:
    if isinstance(value, str):
        # No parameter needs a mark of direction, and the words around it have none of their own to hold against it.
        return _DIRECTIONS.sub("", _CONTROLS.sub("", value))
    # Fluent takes a bool for a number and would say 1.
    return str(value).lower() if isinstance(value, bool) else value


def _datetime(value: Any, **options: Any) -> Any:
    from fluent.runtime.types import fluent_date

    return fluent_date(_moment(value) if isinstance(value, str) else value, **options)


def _moment(text: str) -> date | datetime:
    try:
        return date.fromisoformat(text)
    except ValueError:
        return datetime.fromisoformat(text)


def _without_values(error: Exception) -> str:
    from fluent.runtime.errors import FluentReferenceError

    # These name the missing key or parameter; the texts of other errors may quote a value.
    return (
        str(error) if isinstance(error, FluentReferenceError) else f"a parameter does not fit: {type(error).__name__}"
    )
