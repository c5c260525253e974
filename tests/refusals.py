"""What the tests of messages share: clocks that are set back, and the error of a message that is refused."""

from datetime import UTC, datetime, timedelta, tzinfo

import pytest
from conftest import new_message
from sqlalchemy.orm import Session

from engagement import EngagementMessageRepository, InvalidMessage

NOON = datetime(2025, 11, 21, 12, tzinfo=UTC)
A_MICROSECOND = timedelta(microseconds=1)
SECRET = "Zx9secret"


class Clocks(tzinfo):
    """A place whose clocks are set back by an hour at 02:00 on 2 November 2025: 01:30 comes twice."""

    def utcoffset(self, moment):
        """Return 4 hours behind until the second 01:00, and 5 from then on."""
        night = moment.replace(tzinfo=None, fold=0)
        is_summer = night < datetime(2025, 11, 2, 1) or (night < datetime(2025, 11, 2, 2) and moment.fold == 0)  # noqa: DTZ001 - wall-clock times
        return timedelta(hours=-4 if is_summer else -5)

    def dst(self, moment):
        """Return how far the clocks are set forward."""
        return self.utcoffset(moment) + timedelta(hours=5)


CLOCKS = Clocks()


def refused(**given_fields) -> InvalidMessage:
    """Return the error for a message with these fields, raised by a repository that has no database to touch."""
    given = {name: value for name, value in _valid().items() if name not in given_fields} | given_fields
    with pytest.raises(InvalidMessage) as caught:
        EngagementMessageRepository(Session()).queue_message(**given)
    return caught.value


def _valid() -> dict:
    message = new_message()
    return {
        "user_id": message.user_id,
        "message_type": message.message_type,
        "message_key": message.message_key,
        "message_params": message.message_params,
        "destination": message.destination,
        "destination_jid": message.destination_jid,
    }


def assert_names(error: InvalidMessage, field: str) -> None:
    assert error.field == field
    assert str(error).startswith(f"{field}: ")
