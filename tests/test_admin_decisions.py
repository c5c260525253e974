"""What somebody decides on the admin page: it is what they said, by their name, or it is nothing."""

import pytest
from admin_page import admin_of, form_of, press, put, send
from conftest import row


@pytest.fixture(scope="module", name="page")
def _page(shared_engine):
    with admin_of(shared_engine, authentication=lambda _: "Ana Souza") as client:
        yield client


@pytest.mark.parametrize("action", ["resolve", "resolve-", "resolve-none", "resolve-sent-not", "Resolve-Not-Sent"])
@pytest.mark.parametrize("choice", [{}, {"sent": ""}, {"sent": "None"}, {"decision": "resolve-sent"}])
def test_a_form_without_a_choice_resolves_nothing(page, engine, action, choice):
    """The page has one address for each decision: what names neither is refused, and nothing is touched."""
    message_id = put(engine, "in_doubt")
    fields = form_of(page, message_id, "resolve-not-sent")
    before = row(engine, message_id)

    answer = send(page, message_id, action, **fields | choice)

    assert answer.status_code == 404
    assert row(engine, message_id) == before


@pytest.mark.parametrize(
    ("status", "action", "kept"),
    [
        ("in_doubt", "resolve-sent", {"event": "resolved", "sent": True}),
        ("in_doubt", "resolve-not-sent", {"event": "resolved", "sent": False}),
        ("pending", "cancel", {"event": "cancelled"}),
        ("failed", "retry", {"event": "retried"}),
    ],
)
def test_who_decided_is_kept_and_told(page, engine, status, action, kept):
    """The history names who was signed in, and so does the message's page."""
    message_id = put(engine, status)

    told = press(page, message_id, action)

    (entry,) = row(engine, message_id).history
    assert entry | kept | {"by": "Ana Souza"} == entry
    assert "by Ana Souza" in told.text
