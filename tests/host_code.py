"""A host's code that plays one scenario in a sync session and in an async one."""

import asyncio
from typing import Any

from sqlalchemy import Engine
from sqlalchemy.ext.asyncio import AsyncSession, create_async_engine
from sqlalchemy.orm import Session, SessionTransaction
from sqlalchemy.pool import NullPool

from engagement import (
    AsyncEngagementMessageRepository,
    EngagementMessageRepository,
)


class Awaited:
    """A sync session or repository that is awaited like an async one, so that one scenario plays both."""

    def __init__(self, original):
        self._original = original

    def __getattr__(self, name):
        method = getattr(self._original, name)

        async def call(*args, **kwargs):
            result = method(*args, **kwargs)
            return Awaited(result) if isinstance(result, SessionTransaction) else result

        return call


class Host:
    """A host's code: runs a scenario, `async def scenario(session, repository)`, in a session that it then closes."""

    def __init__(self, engine: Engine, kind: str) -> None:
        self.engine = engine
        self.kind = kind

    def play(self, scenario, *, isolation: str = "READ COMMITTED", schema: str | None = None) -> Any:
        """Run the scenario to its end, and return what it returns."""
        return asyncio.run(getattr(self, f"_{self.kind}")(scenario, isolation, schema))

    async def _sync(self, scenario, isolation, schema):
        with Session(self.engine.execution_options(isolation_level=isolation)) as session:
            return await scenario(Awaited(session), Awaited(EngagementMessageRepository(session, schema=schema)))

    async def _async(self, scenario, isolation, schema):
        engine = create_async_engine(self.engine.url, poolclass=NullPool, isolation_level=isolation)
        async with AsyncSession(engine) as session:
            return await scenario(session, AsyncEngagementMessageRepository(session, schema=schema))
