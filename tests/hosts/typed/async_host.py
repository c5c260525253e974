"""The same host with asyncio."""

from typing import assert_type

from sqlalchemy.ext.asyncio import AsyncSession, async_sessionmaker

from engagement import (
    AsyncEngagementMessageRepository,
    Cancellation,
    EngagementMessage,
    OutgoingMessage,
    Queued,
    Sent,
)


async def queue(new_session: async_sessionmaker[AsyncSession]) -> Queued:
    async with new_session.begin() as session:
        repository = AsyncEngagementMessageRepository(session)
        assert_type(await repository.get_message(1), EngagementMessage | None)
        assert_type(await repository.cancel_message(1, reason="moved away"), Cancellation)
        assert_type(await repository.resolve_message(1, sent=True), bool)
        return await repository.queue_message(
            user_id="user123",
            message_type="goodbye",
            message_key="goodbye.day14",
            message_params={"name": "Ana", "days": 14},
            destination="individual",
            destination_jid="5511999999999@s.whatsapp.net",
        )


async def send(message: OutgoingMessage) -> Sent:
    return Sent(str(message.delivery_id))
