"""Messages brought into a status by hand, and one call of a repository as the tests write it."""

from datetime import UTC, datetime, timedelta

from conftest import execute, new_message, queue
from sqlalchemy import Engine
from sqlalchemy.orm import Session

from engagement import Cancellation, EngagementMessageRepository, MessageStatus
from engagement._claim import START
from engagement._delivery import database as claims
from engagement._delivery.taking import ALL_TYPES, Types

STATUSES = list(MessageStatus)
NOON = datetime(2030, 11, 21, 12, tzinfo=UTC)
HOLDER = claims.Holder("worker", timedelta(minutes=5))


def update(engine: Engine, assignments: str, where: str = "true", **values) -> None:
    execute(engine, f"UPDATE engagement_message_queue SET {assignments} WHERE {where}", **values)


def put(engine: Engine, message_id: int, status: str) -> None:
    """Bring a message into a status by hand, as the constraints want it."""
    execute(
        engine,
        "UPDATE engagement_message_queue SET status = :status, sent_at = CASE WHEN :status = 'sent' THEN now() END,"
        " lease_expires_at = CASE WHEN :status = 'sending' THEN now() + interval '1 hour' END,"
        " claimed_by = :worker WHERE id = :id",
        status=status,
        worker=HOLDER.name,
        id=message_id,
    )


def queued_as(engine: Engine, status: str, user_id: str = "user1", **fields) -> int:
    (message_id,) = queue(engine, new_message(user_id, **fields))
    put(engine, message_id, status)
    return message_id


def one_in_each_status(engine: Engine, user_id: str = "user1") -> dict[str, int]:
    return {
        str(status): queued_as(
            engine, status, user_id, message_type=f"was_{status}", idempotency_key=f"{user_id}{status}"
        )
        for status in STATUSES
    }


def call(engine: Engine, method: str, *args, **kwargs):
    """Call one method of a repository and commit."""
    with Session(engine) as session, session.begin():
        return getattr(EngagementMessageRepository(session), method)(*args, **kwargs)


def version(engine: Engine, message_id: int) -> int:
    """Return which transaction wrote the row last."""
    return execute(engine, "SELECT xmin::text FROM engagement_message_queue WHERE id = :id", id=message_id).scalar_one()


def claim(session: Session, types: Types = ALL_TYPES, **options) -> list:
    claimed = claims.claim(
        session.connection(), HOLDER, limit=10, after=START, busy=[], one_per_destination=True, types=types, **options
    )
    return claimed.claims


def take_turns(session: Session, types: Types = ALL_TYPES) -> dict:
    values = {**claims.where_due(START, [], [], types), "limit": 10}
    return claims.take_turns(session.connection(), values, types)


def repeat(method: str, *args, **kwargs):
    return lambda session: getattr(EngagementMessageRepository(session), method)(*args, **kwargs)


def too_late(status: str) -> Cancellation:
    return Cancellation("too_late", MessageStatus(status))
