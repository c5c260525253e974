"""A page's way to the queue: in a thread, in a transaction of its own, which `patience` keeps short."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

from sqlalchemy import Engine, func, select
from sqlalchemy.exc import SQLAlchemyError
from sqlalchemy.orm import Session
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException

from engagement._logging import logger
from engagement._sql.errors import is_not_migrated, is_unreadable, sqlstate
from engagement._sql.hiding import ListIsHidden

R = TypeVar("R")


_TOO_LONG = frozenset({"57014", "55P03"})  # a statement, or its wait for a lock, was cancelled


@dataclass(frozen=True, slots=True)
class Queue:
    """The table, for one page at a time. A refusal of the database becomes a page with the reason."""

    engine: Engine
    schema: str | None
    patience: timedelta

    async def run(self, work: Callable[[Session], R], *, if_too_long: str = "Try again.") -> R:
        """Return the result of `work` and commit its changes. `if_too_long` is the page's advice after a time-out."""
        return await run_in_threadpool(self._run, work, if_too_long)

    def _run(self, work: Callable[[Session], R], if_too_long: str) -> R:
        try:
            with Session(self.engine, expire_on_commit=False) as session, session.begin():
                # The database has messages to send: a page must not keep it busy.
                limit = f"{self.patience // timedelta(milliseconds=1)}ms"
                session.execute(select(func.set_config("statement_timeout", limit, True)))  # noqa: FBT003
                return work(session)
        except (SQLAlchemyError, ListIsHidden) as error:
            logger.warning("engagement.admin_database_failed error=%s", type(error).__name__)
            raise HTTPException(503, self._said(error, if_too_long)) from None

    def _said(self, error: SQLAlchemyError | ListIsHidden, if_too_long: str) -> str:
        """Return the error in words. The server's text is left out: it may show a row."""
        if isinstance(error, ListIsHidden):
            return f"{str(error).capitalize()}."
        state = sqlstate(error)
        if state in _TOO_LONG:
            return f"The database took longer than {self.patience.total_seconds():g} s. {if_too_long}"
        if is_not_migrated(error):
            return "The queue's table is missing or old. Run: engagement upgrade"
        if is_unreadable(error):
            return "A message cannot be read. Run: engagement verify"
        return "The database does not answer." if state is None else f"The database refused: {state}."
