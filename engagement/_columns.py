"""The types of our columns whose values Python would not read, or PostgreSQL not take, as they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from enum import StrEnum
from typing import Any

from sqlalchemy import Dialect, Text, cast, type_coerce
from sqlalchemy.dialects.postgresql import JSONB
from sqlalchemy.types import TypeDecorator


class TextOf(TypeDecorator[Any]):
    """A text column whose values are the members of a `StrEnum`."""

    impl = Text
    cache_ok = True

    def __init__(self, words: type[StrEnum]) -> None:
        super().__init__()
        self.words = words
        self._members = {word.value: word for word in words}  # Calling the enum takes four times as long.

    def process_bind_param(self, value: Any, dialect: Dialect) -> str | None:  # noqa: ARG002
        """Give the driver a plain `str`: psycopg would dump the enum's name."""
        return None if value is None else str(self.words(value))

    def process_result_value(self, value: Any, dialect: Dialect) -> Any:  # noqa: ARG002
        """Return the member."""
        return None if value is None else self._members[value]


class ReadableJson(TypeDecorator[Any]):
    """A JSONB column that can always be read. A value that Python cannot read is `UNREADABLE`.

    It is read as text: drivers take JSON for UTF-8 in every client encoding, and a number of 5,000 digits, or a list of
    5,000 levels, written by hand, would break the fetch of every row beside it.
    See docs/decisions.md#2026-11-29--json-is-selected-as-text.
    """

    impl = JSONB
    cache_ok = True

    def column_expression(self, column: Any) -> Any:
        """Select the text."""
        return type_coerce(cast(column, Text), self)

    def result_processor(self, dialect: Dialect, coltype: object) -> Callable[[Any], Any]:  # noqa: ARG002
        """Return the function that reads the text."""
        return _read_json

    def coerce_compared_value(self, op: Any, value: Any) -> Any:
        """Index and compare as JSONB does."""
        return self.impl_instance.coerce_compared_value(op, value)


UNREADABLE = "cannot be read by Python"
_DEEPEST = 500
"""Levels of a JSON value. Python's JSON writer, and the page, get through as many."""


def _read_json(text: Any) -> Any:
    try:
        value = json.loads(text) if isinstance(text, str) else text
        if not _is_deeper(value, _DEEPEST):
            return value
    except (ValueError, RecursionError):
        pass
    return {UNREADABLE: True} if text[:1] == "{" else [UNREADABLE]


def _is_deeper(value: Any, levels: int) -> bool:
    level = [value]
    for _ in range(levels):
        level = [
            inner
            for outer in level
            if isinstance(outer, dict | list)
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
        if not level:
            return False
    return True
