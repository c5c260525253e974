"""Databases that were not made in UTF-8: what cannot be stored is refused before anything is touched."""

from datetime import UTC, datetime

import pytest
from conftest import new_message, queue, row
from sqlalchemy import create_engine, text
from sqlalchemy.orm import Session
from sqlalchemy.pool import NullPool

from engagement import (
    EngagementMessageRepository,
    InvalidMessage,
    Receipt,
    Recorded,
    Sent,
    migrations,
    process_message_queue,
)


@pytest.fixture(name="made_in")
def _made_in(shared_engine):
    """Return an engine on a database of an encoding, whose client has one too."""
    server = create_engine(shared_engine.url, poolclass=NullPool, isolation_level="AUTOCOMMIT")
    engines = []

    def make(encoding, client=None):
        name = f"engagement_{encoding.lower()}"
        with server.connect() as connection:
            connection.execute(text(f"DROP DATABASE IF EXISTS {name} WITH (FORCE)"))
            connection.execute(
                text(f"CREATE DATABASE {name} TEMPLATE template0 ENCODING '{encoding}' LC_COLLATE 'C' LC_CTYPE 'C'")
            )
        options = {} if client is None else {"connect_args": {"client_encoding": client}}
        engines.append(create_engine(shared_engine.url.set(database=name), **options))
        migrations.upgrade(engines[-1])
        return engines[-1]

    yield make
    for engine in engines:
        engine.dispose()
        with server.connect() as connection:
            connection.execute(text(f"DROP DATABASE {engine.url.database} WITH (FORCE)"))


BAD = {
    "user_id": "user→1",
    "message_key": "goodbye→",
    "message_params": {"name": "→"},
    "idempotency_key": "→",
}


@pytest.mark.parametrize(
    ("encoding", "client"), [("LATIN1", None), ("LATIN1", "utf8"), ("UTF8", "latin1"), ("WIN1252", "utf8")]
)
def test_a_text_that_the_encoding_lacks_is_refused_and_poisons_nothing(made_in, encoding, client):
    """Its field is named, and the caller's transaction goes on."""
    engine = made_in(encoding, client)
    with Session(engine) as session, session.begin():
        repository = EngagementMessageRepository(session)
        repository.queue_message(new_message("first"))
        for field, value in BAD.items():
            with pytest.raises(InvalidMessage, match=f"^{field}: .*(LATIN1|WIN1252)"):
                repository.queue_message(new_message(**{"user_id": "é", field: value}))
            with pytest.raises(InvalidMessage, match=f"^{field}"):
                repository.queue_messages([new_message("b"), new_message(**{"user_id": "é", field: value})])
        with pytest.raises(InvalidMessage, match=r"^idempotency_key"):
            repository.get_message_by_key("→")
        with pytest.raises(InvalidMessage, match=r"^user_id"):
            repository.forget_user("→")
        queued = repository.queue_message(new_message("é", message_params={"name": "Zoë"}))
        assert repository.cancel_message(queued.message_id, "→ too late", by="Zoë").is_cancelled

    with Session(engine) as session:
        found = EngagementMessageRepository(session).get_message(queued.message_id)
    assert (found.user_id, found.message_params, found.status) == ("é", {"name": "Zoë"}, "cancelled")
    assert found.history[-1]["reason"] == "\\u2192 too late"
    assert found.history[-1]["by"] == "Zoë"


def test_a_receipt_in_words_that_the_encoding_lacks_is_recorded_all_the_same(made_in):
    """Its words are replaced, and an id that cannot be stored is that of no message."""
    engine = made_in("LATIN1")
    (message_id,) = queue(engine, new_message())
    process_message_queue(engine, lambda _: Sent("wamid"))
    given = {"event": "undeliverable", "at": datetime.now(UTC), "reason": "→ away"}

    with Session(engine) as session, session.begin():
        answers = EngagementMessageRepository(session).record_receipts(
            [
                Receipt(provider="é", provider_message_id="→", **given),
                Receipt(provider="→", provider_message_id="wamid", **given),
            ]
        )

        longest = given | {"provider": "→" * 255, "reason": "→" * 1_000, "code": "→" * 1_000}
        early = EngagementMessageRepository(session).record_receipts([Receipt(provider_message_id="early", **longest)])

    assert [each.answer for each in (*answers, *early)] == [Recorded.UNKNOWN_MESSAGE, Recorded.RECORDED, Recorded.KEPT]
    with Session(engine) as session:
        found = EngagementMessageRepository(session).get_message(message_id)
    assert (found.error_message, found.history[-1]["by"]) == ("\\u2192 away", "\\u2192")


def test_sql_ascii_stores_what_it_is_given(made_in):
    """A database without an encoding takes everything, if its clients say which one they have."""
    engine = made_in("SQL_ASCII", "utf8")
    with Session(engine) as session, session.begin():
        queued = EngagementMessageRepository(session).queue_message(new_message("→", message_params={"name": "→"}))
    seen = []

    def send(message):
        seen.append(message)
        return Sent("wamid→")

    process_message_queue(engine, send)

    assert seen[0].message_params == {"name": "→"}
    found = row(engine, queued.message_id)
    assert (found.status, found.provider_message_id) == ("sent", "wamid→")
