"""Delivery: what each outcome does, and that a claim is committed before the send."""

from conftest import new_message, queue, row

from engagement import Sent, process_message_queue


def test_a_due_message_is_sent(engine):
    """What is due is sent once and recorded with the provider's id."""
    (message_id,) = queue(engine, new_message())

    result = process_message_queue(engine, lambda message: Sent("wamid.1"))

    assert (result.processed, result.succeeded) == (1, 1)
    assert row(engine, message_id).status == "sent"
    assert row(engine, message_id).provider_message_id == "wamid.1"
