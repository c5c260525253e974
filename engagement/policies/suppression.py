"""Whether anything may be sent to the address at all, as the suppression list says."""

from __future__ import annotations

from datetime import UTC, datetime

from sqlalchemy import Engine
from sqlalchemy.exc import SQLAlchemyError

from engagement._sending.protocols import Transport
from engagement._sql import suppressing
from engagement._sql.errors import is_transient
from engagement._sql.own_transactions import connect, for_own_transactions
from engagement._sql.schemas import schema_in_force
from engagement.messages import OutgoingMessage, address_hash
from engagement.models import SUPPRESSION_TABLE_NAME, qualified_name
from engagement.outcomes import Outcome, Postpone, Withdraw
from engagement.policies.gates import A_MINUTE, Gate


class Suppression(Gate):
    """Sends nothing to an address that is on the `SuppressionList`: the message is cancelled (`Withdraw`).

    Without an answer of the database nothing is sent: the message is postponed by a minute, or `NotSent` if the error
    would come again, as where row-level security hides the list from the worker's role. Each check takes a connection
    of `engine` for one short query. Put it inside `Route`, around the transport, so that it is asked about the address
    of now: `Route(Suppression(transport, engine), where)`.
    """

    def __init__(self, transport: Transport, engine: Engine, *, schema: str | None = None) -> None:
        super().__init__(transport)
        self._engine = for_own_transactions(engine, schema)

    def check(self, message: OutgoingMessage) -> OutgoingMessage | Outcome:
        """Return the message if its address is not on the list."""
        values = {"of_address": address_hash(message.destination_jid)}
        try:
            with connect(self._engine) as connection, connection.begin():
                values["list"] = qualified_name(schema_in_force(None, connection), SUPPRESSION_TABLE_NAME)
                found = suppressing.found(connection.execute(suppressing.find(), values))
        except SQLAlchemyError as error:
            if not is_transient(error):
                raise
            return Postpone(datetime.now(UTC) + A_MINUTE, "the database did not answer the suppression list")
        return message if found is None else Withdraw(f"suppressed: {found.reason or 'no reason is kept'}")
