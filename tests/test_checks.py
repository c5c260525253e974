"""What the database itself refuses, whoever writes it."""

import pytest
from conftest import execute, new_message, queue
from sqlalchemy import CheckConstraint
from sqlalchemy.exc import IntegrityError

from engagement import EngagementMessage

REFUSED = {
    "status_known": "status = 'lost'",
    "destination_known": "destination = 'everybody'",
    "message_type_format": "message_type = 'Good:bye'",
    "message_params_is_object": "message_params = '[]'",
    "history_is_array": "history = '{}'",
    "counters_not_negative": "attempt = -1",
    "counters_bounded": "attempt = 1000000001",
    "claimed_by_form": "claimed_by = 'w/recovery/1000000'",
    "sent_iff_sent_at": "status = 'sent'",
    "sending_iff_lease": "status = 'sending'",
    "delivered_was_sent": "delivered_at = now()",
    "read_was_delivered": "read_at = now()",
    "receipts_readable": "undeliverable_at = 'infinity'",
    "ended_without_doubt": "status = 'failed', has_doubt = true",
    "pending_has_destination": "destination_jid = NULL",
    "jid_fits_destination": "destination = 'group'",
    "expires_after_scheduled": "expires_at = scheduled_for",
    "times_readable": "next_attempt_at = 'infinity'",
}
ALSO_REFUSED = [
    ("status_known", "status = 'Pending'"),
    ("message_type_format", "message_type = ''"),
    ("message_type_format", "message_type = E'goodbye\\n'"),
    ("message_params_is_object", "message_params = 'null'"),
    ("history_is_array", "history = 'null'"),
    ("counters_not_negative", "retry_count = -1"),
    ("counters_bounded", "retry_count = 2147483647"),
    ("claimed_by_form", "claimed_by = repeat('x', 3001)"),
    ("sent_iff_sent_at", "sent_at = now()"),
    ("sending_iff_lease", "lease_expires_at = now()"),
    (
        "delivered_was_sent",
        "status = 'sent', sent_at = now(), delivered_at = now(), undeliverable_at = now()",
    ),
    ("receipts_readable", "status = 'sent', sent_at = now(), delivered_at = '-infinity'"),
    ("receipts_readable", "status = 'sent', sent_at = now(), delivered_at = now(), read_at = 'infinity'"),
    ("ended_without_doubt", "status = 'cancelled', has_doubt = true"),
    ("ended_without_doubt", "status = 'sent', sent_at = now(), has_doubt = true"),
    ("jid_fits_destination", "destination_jid = '123456789012345678@g.us'"),
    ("times_readable", "scheduled_for = '-infinity'"),
    ("times_readable", "expires_at = 'infinity'"),
    ("times_readable", "next_attempt_at = '0001-01-01 00:00:00+00'"),
    ("times_readable", "next_attempt_at = '10000-01-01 00:00:00+00'"),
]


@pytest.mark.parametrize(("constraint", "change"), [*REFUSED.items(), *ALSO_REFUSED])
def test_a_hand_written_update_cannot_break_a_promise(engine, constraint, change):
    """Each promise of the table is a named constraint, which an UPDATE by hand runs into."""
    queue(engine, new_message())

    with pytest.raises(IntegrityError) as caught:
        execute(engine, f"UPDATE engagement_message_queue SET {change}")

    assert caught.value.orig.diag.constraint_name == f"engagement_message_queue_{constraint}"


def test_every_check_was_tried():
    """No CHECK is without a row in the test above."""
    checks = [item for item in EngagementMessage.__table__.constraints if isinstance(item, CheckConstraint)]

    assert {check.name for check in checks} == {f"engagement_message_queue_{name}" for name in REFUSED}


@pytest.mark.parametrize(
    "change",
    [
        "status = 'sent', sent_at = now()",
        "status = 'sending', lease_expires_at = now()",
        "status = 'cancelled', destination_jid = NULL",
        "status = 'in_doubt', has_doubt = true",
        "has_doubt = true",
        "destination = 'group', destination_jid = '123456789012345678@g.us'",
        "expires_at = scheduled_for + interval '1 microsecond'",
        "next_attempt_at = '0001-01-02 00:00:00+00'",
        "next_attempt_at = '9999-12-30 00:00:00+00'",
        "message_type = 'a_9'",
    ],
)
def test_a_hand_written_update_that_keeps_the_promises_is_taken(engine, change):
    """The constraints refuse no more than what they are for."""
    queue(engine, new_message())

    assert execute(engine, f"UPDATE engagement_message_queue SET {change}").rowcount == 1


def test_a_key_is_unique_for_everybody(engine):
    """Neither an INSERT nor an UPDATE by hand gets a key twice."""
    queue(engine, new_message(idempotency_key="a"), new_message(idempotency_key="b"))

    with pytest.raises(IntegrityError) as caught:
        execute(engine, "UPDATE engagement_message_queue SET idempotency_key = 'a'")

    assert caught.value.orig.diag.constraint_name == "engagement_message_queue_idempotency_key_key"
