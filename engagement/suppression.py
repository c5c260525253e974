"""The suppression list: addresses that no message is sent to, whatever its key.

A provider calls an address unreachable for good, or a person answers STOP: tomorrow's message has a new key and would
ask again. `policies.Suppression` asks this list before each send.
"""

from __future__ import annotations

from collections.abc import Callable
from datetime import datetime
from typing import TYPE_CHECKING, Concatenate, ParamSpec, TypeVar

from engagement._sql import suppressing
from engagement._sql.host_sessions import HostSession
from engagement._sql.parameters import moment_text
from engagement.messages import Suppressed, address_hash
from engagement.messages.checks import checked_address, checked_moment, checked_text
from engagement.models import MOST_REASON, SUPPRESSION_TABLE_NAME, checked_schema

if TYPE_CHECKING:
    from sqlalchemy.ext.asyncio import AsyncSession
    from sqlalchemy.orm import Session

P = ParamSpec("P")
R = TypeVar("R")


class SuppressionList:
    """Put addresses on the list and take them off, in `session`'s transaction or savepoint. Commits nothing.

    An address is a `destination_jid`, compared as it is: a person's number (`5511999990000@s.whatsapp.net`) and their
    `@lid` are two. Only its SHA-256 is kept. A trial of all telephone numbers finds them out: the list is as personal
    as a list of numbers. Bad input raises `InvalidMessage` before the database is touched. A role from which row-level
    security hides the list gets a `RuntimeError`, and not the answer of an empty list. `schema` is that of
    `EngagementMessageRepository`.
    """

    def __init__(self, session: Session, *, schema: str | None = None) -> None:
        self._host = HostSession(session, schema)

    def suppress(self, address: str, reason: str, *, until: datetime | None = None) -> None:
        """Let nothing be sent to `address`, for good or until a moment. `reason` is yours (`"answered STOP"`).

        One that is on the list already gets the new reason, and the later of both moments. A message that is being sent
        at this moment may still arrive.
        """
        hashed = address_hash(checked_address(address))
        reason = checked_text("reason", reason, max_characters=MOST_REASON)
        moment = None if until is None else moment_text(checked_moment("until", until))
        given: suppressing.Entry = {
            "address_hash": hashed,
            "reason": self._host.storable(reason),
            "until": moment,
        }
        self._host.execute(suppressing.suppress(), suppressing.ENTRIES.parameter([given]))

    def unsuppress(self, address: str) -> bool:
        """Let messages be sent to `address` again; tell whether it was on the list. Nothing is sent for it."""
        values = {"of_address": address_hash(checked_address(address))}
        was_on_it: bool | None = self._host.execute(suppressing.unsuppress(), values).scalar_one_or_none()
        if was_on_it is None:
            self.find(address)  # It raises if the list only looks empty.
        return was_on_it is True

    def find(self, address: str) -> Suppressed | None:
        """Return why and since when nothing is sent to `address`; None if it is not on the list now."""
        hashed = address_hash(checked_address(address))
        values = {"of_address": hashed, "list": self._host.name_of(SUPPRESSION_TABLE_NAME)}
        return suppressing.found(self._host.rows(suppressing.find(), values))


class AsyncSuppressionList:
    """`SuppressionList`, awaited: the same methods, promises and errors, on an `AsyncSession`."""

    def __init__(self, session: AsyncSession, *, schema: str | None = None) -> None:
        self._session = session
        self._schema = checked_schema(schema)

    async def suppress(self, address: str, reason: str, *, until: datetime | None = None) -> None:
        """Let nothing be sent to `address`, for good or until a moment."""
        await self._run(SuppressionList.suppress, address, reason, until=until)

    async def unsuppress(self, address: str) -> bool:
        """Let messages be sent to `address` again; tell whether it was on the list."""
        return await self._run(SuppressionList.unsuppress, address)

    async def find(self, address: str) -> Suppressed | None:
        """Return why and since when nothing is sent to `address`; None if it is not on the list now."""
        return await self._run(SuppressionList.find, address)

    async def _run(self, method: Callable[Concatenate[SuppressionList, P], R], *args: P.args, **kwargs: P.kwargs) -> R:
        def call(session: Session) -> R:
            return method(SuppressionList(session, schema=self._schema), *args, **kwargs)

        return await self._session.run_sync(call)
