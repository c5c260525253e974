"""A FastAPI host: the request that registers a member queues a welcome, and a worker beside the app sends it.

DATABASE_URL=postgresql+psycopg://user@host/name uvicorn --app-dir examples fastapi_host:app
curl -X POST "localhost:8000/members?user_id=ana&phone=5511999990000"
"""

import asyncio
import os
import threading
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, HTTPException
from sqlalchemy import create_engine
from sqlalchemy.exc import IntegrityError
from sqlalchemy.ext.asyncio import async_sessionmaker, create_async_engine
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from engagement import AsyncEngagementMessageRepository, InvalidMessage, OutgoingMessage, Worker, migrations

engine = create_engine(os.environ["DATABASE_URL"])
async_engine = create_async_engine(engine.url)
new_session = async_sessionmaker(async_engine)


class Base(DeclarativeBase):
    """The host's own tables."""


class Member(Base):
    """A person, with a phone that nobody else has."""

    __tablename__ = "members"
    user_id: Mapped[str] = mapped_column(primary_key=True)
    phone: Mapped[str] = mapped_column(unique=True)


def send(message: OutgoingMessage) -> None:
    """Stand in for a provider: a transport of the package, or a function such as this one."""
    print(f"{message.message_key} to {message.destination_jid}")


@asynccontextmanager
async def lifespan(_app: FastAPI) -> AsyncIterator[None]:
    """Send beside the app; on shutdown the sends in hand finish."""
    migrations.upgrade(engine)  # In production a step of the deployment, as the host's own.
    Base.metadata.create_all(engine)
    stop = threading.Event()
    sending = asyncio.create_task(asyncio.to_thread(Worker(engine, send).run, stop))
    yield
    stop.set()
    await sending
    engine.dispose()
    await async_engine.dispose()


app = FastAPI(lifespan=lifespan)


@app.post("/members", status_code=201)
async def register(user_id: str, phone: str) -> dict[str, bool]:
    """Register a member and queue the welcome: both or neither."""
    try:
        # Not in a dependency with `yield`: unless its scope is "function", it commits after the answer has left.
        async with new_session.begin() as session:
            queued = await AsyncEngagementMessageRepository(session).queue_message(
                user_id=user_id,
                message_type="welcome",
                message_key="welcome.member",
                destination="individual",
                destination_jid=f"{phone}@s.whatsapp.net",
            )
            session.add(Member(user_id=user_id, phone=phone))
    except InvalidMessage as error:
        raise HTTPException(422, {error.field: error.problem}) from None
    except IntegrityError:
        raise HTTPException(409, "There is such a member.") from None
    return {"welcome": queued.created}
