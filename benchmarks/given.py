"""The messages to queue: of many users in no order, each with about 200 bytes of params and a key of its own."""

import json
import random
from collections.abc import Iterable, Iterator
from datetime import UTC, datetime
from itertools import count
from typing import Any, NamedTuple

from engagement import NewMessage

TODAY = datetime.now(UTC).date().isoformat()
_numbers = count(1)


class Given(NamedTuple):
    """The values of one message, as a host has them from its own tables."""

    user_id: str
    message_params: dict[str, Any]
    destination_jid: str


def given(how_many: int) -> list[Given]:
    """Return as many as wanted, all to users that were never given before."""
    numbers = [next(_numbers) for _ in range(how_many)]
    random.shuffle(numbers)
    return list(stream(numbers))


def stream(numbers: Iterable[int]) -> Iterator[Given]:
    """Make one after the other, as they are asked for."""
    for number in numbers:
        params = {
            "name": f"Maria da Silva {number}",
            "days_inactive": number % 30,
            "last_habit": "drink two glasses of water before breakfast",
            "streak": {"best": 41, "current": 0},
            "link": f"https://app.example.com/back/{number:09d}?utm=goodbye",
        }
        yield Given(f"user-{number:09d}", params, f"55{number:011d}@s.whatsapp.net")


def new_messages(rows: Iterable[Given]) -> Iterator[NewMessage]:
    """Make and check our values, one after the other, as they are asked for."""
    for row in rows:
        yield NewMessage(
            user_id=row.user_id,
            message_type="goodbye",
            message_key="goodbye.14_days",
            message_params=row.message_params,
            destination="individual",
            destination_jid=row.destination_jid,
        )


def key(row: Given) -> str:
    """Return the key that a message has by default."""
    return f"{row.user_id}:goodbye:{TODAY}"


def as_json(row: Given) -> str:
    """Return the params as they are stored."""
    return json.dumps(row.message_params, separators=(",", ":"))
