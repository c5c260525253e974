"""Batches of messages, the chunks in which they are queued, and the keys that are there."""

from contextlib import contextmanager

import pytest
from conftest import new_message
from sqlalchemy import Engine, text

from engagement import NewMessage


def keys(engine: Engine) -> list[str]:
    with engine.connect() as connection:
        query = "SELECT idempotency_key FROM engagement_message_queue ORDER BY id"
        return list(connection.execute(text(query)).scalars())


def messages(count: int, **given) -> list[NewMessage]:
    return [new_message(idempotency_key=f"k{number:06}", **given) for number in range(count)]


@contextmanager
def chunks_of(size: int):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("engagement._queueing.batch.CHUNK", size)
        yield
