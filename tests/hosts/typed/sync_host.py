"""A host with types: what it imports, calls and gets back is known to a type checker."""

import threading
from datetime import time, timedelta
from typing import assert_type
from zoneinfo import ZoneInfo

from sqlalchemy import Connection, Engine, text
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from engagement import (
    EngagementMessage,
    EngagementMessageMixin,
    EngagementMessageRepository,
    InDoubt,
    MessageStatus,
    NewMessage,
    NotSent,
    OnSettled,
    OutgoingMessage,
    ProcessResult,
    Queued,
    Sent,
    Worker,
    idempotency_key,
    migrations,
    process_message_queue,
    verify,
)
from engagement.policies import QuietHours
from engagement.transports.gateway import WhatsAppGateway


class Base(DeclarativeBase):
    pass


class Visit(Base):
    __tablename__ = "visits"
    user_id: Mapped[str] = mapped_column(primary_key=True)


class Message(EngagementMessageMixin, Base):
    pass


def text_of(message: OutgoingMessage) -> str:
    return f"{message.message_key} {message.message_params.get('name')}"


def queue(session: Session) -> Queued:
    repository = EngagementMessageRepository(session)
    session.add(Visit(user_id="user123"))
    message = NewMessage(
        user_id="user123",
        message_type="weekly_review",
        message_key="weekly_review",
        destination="individual",
        destination_jid="5511999999999@s.whatsapp.net",
        tz=ZoneInfo("America/Sao_Paulo"),
    )
    assert_type(repository.queue_messages([message]).created, int)
    assert_type(repository.get_message(1), EngagementMessage | None)
    queued = repository.queue_message(message)
    assert_type(queued.created, bool)
    assert_type(queued.status, MessageStatus | None)
    assert_type(idempotency_key("user123", "goodbye"), str)
    return queued


def send(message: OutgoingMessage) -> Sent | NotSent | InDoubt:
    if message.attempt > 1:
        return NotSent("rate limit", retry_after=timedelta(minutes=5))
    return Sent(str(message.delivery_id))


def note(connection: Connection, message: OutgoingMessage, status: MessageStatus) -> None:
    if status is MessageStatus.SENT:
        connection.execute(text("UPDATE visits SET said = now() WHERE user_id = :id"), {"id": message.user_id})


def run(engine: Engine, stop: threading.Event) -> None:
    migrations.upgrade(engine)
    result = process_message_queue(engine, send, concurrency=2, limit=100)
    assert_type(result, ProcessResult)
    assert_type(result.succeeded, int)
    with Session(engine) as session:
        for violation in verify(session):
            assert_type(violation.message_id, int | None)
    gateway = WhatsAppGateway(url="http://evolution:8080", key="key", session="main", render=text_of)
    quiet = QuietHours(gateway, lambda _: "America/Sao_Paulo", start=time(21), end=time(8))
    on_settled: OnSettled = note
    Worker(engine, quiet, prune_older_than=timedelta(days=90), on_settled=on_settled).run(stop)
