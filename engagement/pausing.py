"""Pauses: nothing is claimed of everything, of a message type, or by the workers of a sender, until that is lifted.

A row that every claim reads, and no setting of a process: a deploy does not forget it.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Any, Concatenate, ParamSpec, TypeVar

from engagement._sql import pausing
from engagement._sql.host_sessions import HostSession
from engagement.messages import InvalidMessage, Pause
from engagement.messages.checks import checked_moment, checked_text, checked_type
from engagement.models import MOST_BY, MOST_REASON, MOST_SENDER, PauseScope, checked_schema

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session

P = ParamSpec("P")
R = TypeVar("R")


class Pauses:
    """Pause and resume sending, in `session`'s transaction or savepoint. Commits nothing.

    A pause holds for each claim that begins after its commit, in all workers. Sends in hand finish, and lost messages
    are recovered, since that sends nothing. Due messages wait, and are sent after the pause, but for those that expire
    meanwhile. Without `message_type` and `sender` it is a pause of everything. `sender` is that of `Worker`. Bad input
    raises `InvalidMessage` before the database is touched. `schema` is that of `EngagementMessageRepository`.
    """

    def __init__(self, session: Session, *, schema: str | None = None) -> None:
        self._host = HostSession(session, schema)

    def pause(
        self,
        reason: str,
        *,
        message_type: str | None = None,
        sender: str | None = None,
        until: datetime | None = None,
        by: str | None = None,
    ) -> Pause:
        """Let nothing be claimed, until a moment or until `resume`. `reason` is shown wherever messages are.

        A second pause of the same replaces reason, author and moment; it is paused since the first. A moment that has
        passed by the database's clock raises `InvalidMessage`, and changes nothing.
        """
        reason = checked_text("reason", reason, max_characters=MOST_REASON)
        author = None if by is None else checked_text("by", by, max_characters=MOST_BY)
        values = _scope(message_type, sender) | {
            "of_reason": self._host.storable(reason),
            "of_author": author and self._host.storable(author),
            "of_until": None if until is None else checked_moment("until", until),
        }
        rows = self._host.rows(pausing.pause(), values)
        if not rows:
            raise InvalidMessage("until", "has passed")
        return _pause(rows[0])

    def resume(self, *, message_type: str | None = None, sender: str | None = None) -> bool:
        """Lift a pause; tell whether it was in force. Of everything, it leaves the pauses of types and senders."""
        return self._host.execute(pausing.resume(), _scope(message_type, sender)).scalar_one_or_none() is True

    def in_force(self) -> list[Pause]:
        """Return the pauses that are in force, that of everything first."""
        return [_pause(row) for row in self._host.rows(pausing.in_force(), {})]


def _scope(message_type: str | None, sender: str | None) -> dict[str, object]:
    if message_type is not None and sender is not None:
        raise InvalidMessage("sender", "is given beside message_type: a pause is of one of them")
    if message_type is not None:
        return {"of_scope": PauseScope.TYPE.value, "of_name": checked_type("message_type", message_type)}
    if sender is not None:
        name = checked_text("sender", sender, max_characters=MOST_SENDER)
        return {"of_scope": PauseScope.SENDER.value, "of_name": name}
    return {"of_scope": PauseScope.EVERYTHING.value, "of_name": ""}


def _pause(row: Any) -> Pause:
    scope, name, *rest = row
    return Pause(PauseScope(scope), name or None, *rest)


class AsyncPauses:
    """`Pauses`, awaited: the same methods, promises and errors, on an `AsyncSession`."""

    def __init__(self, session: AsyncSession, *, schema: str | None = None) -> None:
        self._session = session
        self._schema = checked_schema(schema)

    async def pause(
        self,
        reason: str,
        *,
        message_type: str | None = None,
        sender: str | None = None,
        until: datetime | None = None,
        by: str | None = None,
    ) -> Pause:
        """Let nothing be claimed, until a moment or until `resume`."""
        return await self._run(Pauses.pause, reason, message_type=message_type, sender=sender, until=until, by=by)

    async def resume(self, *, message_type: str | None = None, sender: str | None = None) -> bool:
        """Lift a pause; tell whether it was in force."""
        return await self._run(Pauses.resume, message_type=message_type, sender=sender)

    async def in_force(self) -> list[Pause]:
        """Return the pauses that are in force, that of everything first."""
        return await self._run(Pauses.in_force)

    async def _run(self, method: Callable[Concatenate[Pauses, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        def call(session: Session) -> R:
            return method(Pauses(session, schema=self._schema), *args, **kwargs)

        return await self._session.run_sync(call)
