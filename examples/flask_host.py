"""A Flask host: the request that books an appointment queues its reminder, and a cron job sends what is due.

export DATABASE_URL=postgresql+psycopg://user@host/name FLASK_APP=examples/flask_host.py
flask create-tables
flask run
curl localhost:5000/appointments -d user_id=ana -d phone=5511999990000 -d starts_at=2030-01-31T09:00:00-03:00
flask send-messages
"""

import os
from datetime import datetime, timedelta

from flask import Flask, request
from sqlalchemy import TIMESTAMP, create_engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import DeclarativeBase, Mapped, Session, mapped_column

from engagement import EngagementMessageRepository, InvalidMessage, OutgoingMessage, migrations, process_message_queue

engine = create_engine(os.environ["DATABASE_URL"])
app = Flask(__name__)


class Base(DeclarativeBase):
    """The host's own tables."""


class Appointment(Base):
    """Who comes when: one person at a time."""

    __tablename__ = "appointments"
    starts_at: Mapped[datetime] = mapped_column(TIMESTAMP(timezone=True), primary_key=True)
    user_id: Mapped[str]


@app.post("/appointments")
def book() -> tuple[dict[str, bool], int]:
    """Book an appointment and queue a reminder for the day before: both or neither."""
    user_id, starts_at = request.form["user_id"], datetime.fromisoformat(request.form["starts_at"])
    with Session(engine) as session, session.begin():
        queued = EngagementMessageRepository(session).queue_message(
            user_id=user_id,
            message_type="reminder",
            message_key="reminder.appointment",
            destination="individual",
            destination_jid=f"{request.form['phone']}@s.whatsapp.net",
            scheduled_for=starts_at - timedelta(days=1),
            expires_at=starts_at,
        )
        session.add(Appointment(starts_at=starts_at, user_id=user_id))
    return {"reminder": queued.created}, 201


@app.errorhandler(IntegrityError)
@app.errorhandler(InvalidMessage)
def refuse(error: IntegrityError | InvalidMessage) -> tuple[dict[str, str], int]:
    """Tell that the time is taken, or what is wrong with the input."""
    if isinstance(error, InvalidMessage):
        return {error.field: error.problem}, 422
    return {"starts_at": "is taken"}, 409


@app.cli.command()
def create_tables() -> None:
    """Create all that is needed."""
    migrations.upgrade(engine)  # In production a step of the deployment, as the host's own.
    Base.metadata.create_all(engine)


def send(message: OutgoingMessage) -> None:
    """Stand in for a provider: a transport of the package, or a function such as this one."""
    print(f"{message.message_key} to {message.destination_jid}")


@app.cli.command()
def send_messages() -> None:
    """Send what is due. For a cron job."""
    print(process_message_queue(engine, send))
