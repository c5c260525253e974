"""Which catalogues are asked for a locale."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from babel import Locale, UnknownLocaleError


class Chain:
    """Which catalogues are asked for a text, one after the other.

    The locale, its shorter forms, then the default and its shorter forms, each followed by its `fallbacks`. Tags tell
    them apart: `pt_BR.UTF-8` is `pt-br`.
    """

    def __init__(self, known: Iterable[str], default: str, fallbacks: Mapping[str, Sequence[str]] | None) -> None:
        self._known = set(map(tag_of, known))
        self._fallbacks = {tag_of(locale): list(map(tag_of, others)) for locale, others in (fallbacks or {}).items()}
        self._longest = max(map(len, (*self._known, *self._fallbacks)), default=0)
        self._default = tag_of(default)

    def of(self, locale: str) -> list[str]:
        """Return the tags of the existing catalogues, in their order."""
        tags: list[str] = []
        # A longer text is no tag: each form of a locale of 65,000 dashes would take as much memory as the last.
        for tag in (*_shorter_forms(tag_of(locale)[: self._longest + 1]), *_shorter_forms(self._default)):
            tags += [tag, *self._fallbacks.get(tag, ())]
        return [tag for tag in dict.fromkeys(tags) if tag in self._known]


def tag_of(locale: str) -> str:
    """Return the tag by which a locale is known, however it is written."""
    return re.split(r"[.@]", locale, maxsplit=1)[0].replace("_", "-").lower()


def _shorter_forms(tag: str) -> list[str]:
    parts = tag.split("-")
    return ["-".join(parts[:length]) for length in range(len(parts), 0, -1)]


def is_known_locale(locale: str) -> bool:
    """Whether plurals, dates and numbers of a locale are known; else those of the machine's would be taken."""
    try:
        Locale.parse(locale, sep="-")
    except (UnknownLocaleError, ValueError):
        return False
    return True
