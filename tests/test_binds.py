"""Sessions of a host that have more than one engine: what is ours goes to the one that our table is on."""

import asyncio
import inspect
from datetime import UTC, datetime, timedelta

import pytest
from conftest import new_message, queue
from flask import Flask
from flask_sqlalchemy import SQLAlchemy
from sqlalchemy import Delete, Text, Update, create_engine, select
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column
from sqlalchemy.pool import NullPool

from engagement import (
    AsyncEngagementMessageRepository,
    EngagementMessage,
    EngagementMessageMixin,
    EngagementMessageRepository,
    MessageStatus,
    Receipt,
    migrations,
    verify,
)
from engagement._operating.lists import count_messages, count_prunable, list_messages, message_ids
from engagement._operating.overview import activity, overview
from engagement.messages import delivery_id, reference
from engagement.models import EngagementBase

DAY = timedelta(days=1)


class HostBase(DeclarativeBase):
    pass


class Visit(HostBase):
    __tablename__ = "visits"
    id: Mapped[int] = mapped_column(primary_key=True)
    user_id: Mapped[str] = mapped_column(Text)


def receipt_of(message_id: int) -> Receipt:
    name = reference(message_id, delivery_id(new_message().key))
    return Receipt(event="read", at=datetime.now(UTC), provider="cloud", reference=name)


CALLS = {
    "queue_message": lambda repository, _: repository.queue_message(new_message()),
    "queue_messages": lambda repository, _: repository.queue_messages([new_message("ana"), new_message("bob")]),
    "get_message": lambda repository, id_: repository.get_message(id_),
    "get_message_by_key": lambda repository, _: repository.get_message_by_key(new_message().key),
    "get_pending_messages": lambda repository, _: repository.get_pending_messages("user1"),
    "count_by_status": lambda repository, _: repository.count_by_status(),
    "reschedule_message": lambda repository, id_: repository.reschedule_message(id_, datetime(2030, 1, 1, tzinfo=UTC)),
    "cancel_message": lambda repository, id_: repository.cancel_message(id_),
    "cancel_pending_messages": lambda repository, _: repository.cancel_pending_messages("user1"),
    "retry_message": lambda repository, id_: repository.retry_message(id_),
    "resolve_message": lambda repository, id_: repository.resolve_message(id_, sent=True),
    "record_receipts": lambda repository, id_: repository.record_receipts([receipt_of(id_)]),
    "forget_user": lambda repository, _: repository.forget_user("user1"),
    "prune_messages": lambda repository, _: repository.prune_messages(DAY),
}
LOOKS = {
    "verify": verify,
    "list_messages": lambda session: list_messages(session, limit=5),
    "count_messages": count_messages,
    "message_ids": lambda session: message_ids(session, after=0, up_to=9, limit=5),
    "count_prunable": lambda session: count_prunable(session, DAY),
    "overview": overview,
    "a rough overview": lambda session: overview(session, count_up_to=1),
    "activity": lambda session: activity(session, datetime.now(UTC) - DAY, DAY),
}


@pytest.fixture(name="other_engine")
def _other_engine(empty_engine):
    """The host's own database, which has its tables and none of ours."""
    HostBase.metadata.create_all(empty_engine)
    return empty_engine


@pytest.fixture(name="replica")
def _replica(empty_engine):
    """A replica that lags: our table is there, and nothing that was queued."""
    migrations.upgrade(empty_engine)
    return empty_engine


def routing_session(leader, follower):
    """Return the class of sessions that SQLAlchemy's documentation shows: reads go to a follower."""

    class RoutingSession(Session):
        def get_bind(self, mapper=None, clause=None, **_):
            if mapper and issubclass(mapper.class_, HostBase):
                raise AssertionError("none of the host's own is here")
            return leader if self._flushing or isinstance(clause, Update | Delete) else follower

    return RoutingSession


def test_every_call_is_tried():
    """The list of calls has all of the repository's methods."""
    public = {name for name in vars(EngagementMessageRepository) if not name.startswith("_")}

    assert CALLS.keys() == public


@pytest.mark.parametrize(
    "ours", [EngagementBase, EngagementMessageMixin, EngagementMessage, EngagementMessage.__table__], ids=str
)
def test_a_session_with_binds_finds_our_engine(engine, other_engine, ours):
    """Whatever names our table in `Session.binds`, each call finds it, and the host's own work goes where it goes."""
    (there,) = queue(engine, new_message())
    with Session(binds={HostBase: other_engine, ours: engine}) as session, session.begin():
        session.add(Visit(user_id="user1"))
        for call in CALLS.values():
            call(EngagementMessageRepository(session), there)
        for look in LOOKS.values():
            look(session)

    with Session(other_engine) as session:
        assert session.scalars(select(Visit.user_id)).all() == ["user1"]


def test_an_async_session_with_binds_finds_our_engine(engine, other_engine):
    """The async repository likewise."""
    (there,) = queue(engine, new_message())

    async def play():
        binds = {
            base: create_async_engine(bound.url, poolclass=NullPool)
            for base, bound in ((HostBase, other_engine), (EngagementBase, engine))
        }
        async with AsyncSession(binds=binds) as session, session.begin():
            for call in CALLS.values():
                answer = call(AsyncEngagementMessageRepository(session), there)
                assert inspect.isawaitable(answer)
                await answer

    asyncio.run(play())


@pytest.mark.parametrize("status", [None, "sent"])
def test_a_duplicate_is_found_where_the_insert_met_it(engine, replica, status):
    """A session that reads from a replica answers with the message that is there, though the replica lacks it."""
    (there,) = queue(engine, new_message())

    with routing_session(engine, replica)() as session:
        queued = EngagementMessageRepository(session).queue_message(new_message())
        many = EngagementMessageRepository(session).queue_messages([new_message()])

    assert (queued.created, queued.message_id, queued.status) == (False, there, MessageStatus.PENDING)
    assert (many.created, many.duplicates) == (0, 1)


def test_a_list_is_read_from_a_follower_of_any_date_style(engine, replica):
    """`list_messages` goes where a SELECT goes, as `get_message` does, and makes the moments readable there."""
    (there,) = queue(replica, new_message())
    german = create_engine(replica.url, poolclass=NullPool, connect_args={"options": "-c datestyle=German"})

    with routing_session(engine, german)() as session:
        listed = list_messages(session)
        got = EngagementMessageRepository(session).get_message(there)
        style = session.connection().exec_driver_sql("SHOW datestyle").scalar()

    assert listed == [got]
    assert style == "German, DMY"


def test_changes_are_made_by_the_leader(engine, replica):
    """What changes a message, and counts them, goes to the engine of updates; the replica sees none of it."""
    with routing_session(engine, replica)() as session, session.begin():
        repository = EngagementMessageRepository(session)
        queued = repository.queue_message(new_message())
        assert repository.queue_messages([new_message(), new_message("ana")]).created == 1
        assert repository.count_by_status()["pending"] == 2
        assert repository.cancel_message(queued.message_id).is_cancelled
        assert repository.forget_user("ana").cancelled == 1

    with Session(engine) as there, Session(replica) as elsewhere:
        assert EngagementMessageRepository(there).count_by_status()["cancelled"] == 2
        assert not any(EngagementMessageRepository(elsewhere).count_by_status().by_status.values())


def test_flask_binds_by_the_key_of_our_metadata(engine, other_engine, monkeypatch):
    """With Flask-SQLAlchemy, a bind key on our MetaData says which of the app's engines has our table."""
    monkeypatch.setitem(EngagementBase.metadata.info, "bind_key", "messages")
    db = SQLAlchemy(engine_options={"poolclass": NullPool})
    app = Flask(__name__)
    app.config["SQLALCHEMY_DATABASE_URI"] = other_engine.url
    app.config["SQLALCHEMY_BINDS"] = {"messages": engine.url}
    db.init_app(app)
    (there,) = queue(engine, new_message())

    with app.app_context():
        for call in CALLS.values():
            call(EngagementMessageRepository(db.session), there)
        for look in LOOKS.values():
            look(db.session)
        db.session.commit()
