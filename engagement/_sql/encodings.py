"""Refuses a text that the database cannot store: the server would do so too, and end the host's transaction with it.

A database that was not made in UTF-8 lacks most characters.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, func, select

from engagement.messages import InvalidMessage
from engagement.outcomes import storable

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

_FREE_TEXTS = frozenset({"reason", "by"})
"""Parameters of which a replacement says as much."""
_FIELDS = {"of_user": "user_id", "of_type": "message_type", "value": "idempotency_key"}
_KEPT = "engagement_encodings"
# As Python knows them, where it does not know PostgreSQL's name.
_PYTHON_NAMES = {"KOI8R": "koi8_r", "KOI8U": "koi8_u"}


def with_storable_texts(
    values: Mapping[str, Any], session: Session, bind_arguments: dict[str, Any]
) -> Mapping[str, Any]:
    """Return the parameters of a statement as the database can store them.

    Raises `InvalidMessage` for a text that may not be replaced, before the server refuses it and with it the
    transaction. The database is only asked about its encoding, once a connection, if a text is not ASCII.
    """
    texts = {name: value for name, value in values.items() if isinstance(value, str) and not value.isascii()}
    if not texts:
        return values
    changed = {}
    for encoding in _encodings(session.connection(bind_arguments=bind_arguments)):
        for name, value in texts.items():
            if _can_encode(value, encoding):
                continue
            if name not in _FREE_TEXTS:
                problem = f"holds a character that {encoding}, the encoding of the database or of its client, lacks"
                raise InvalidMessage(_FIELDS.get(name, name), problem)
            changed[name] = storable(value)
    return {**values, **changed}


def _encodings(connection: Connection) -> tuple[str, ...]:
    """Return the encodings that the texts of this connection pass through, in PostgreSQL's words."""
    if _KEPT not in connection.info:
        settings = (func.pg_catalog.current_setting(f"{side}_encoding") for side in ("server", "client"))
        connection.info[_KEPT] = tuple(dict.fromkeys(connection.execute(select(*settings)).one()))
    kept: tuple[str, ...] = connection.info[_KEPT]
    return kept


def _can_encode(value: str, encoding: str) -> bool:
    # SQL_ASCII stores any bytes.
    name = _PYTHON_NAMES.get(encoding) or re.sub("^WIN", "cp", encoding)
    try:
        codecs.encode(value, "utf-8" if encoding == "SQL_ASCII" else name)
    except UnicodeEncodeError:
        return False
    except LookupError:
        pass  # Python does not know it: the server decides.
    return True
