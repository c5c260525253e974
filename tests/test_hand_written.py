"""Histories and params that somebody wrote by hand: all that is looked at can be looked at, and decided."""

import json

import pytest
from admin_page import admin_of
from conftest import execute, new_message, queue
from sqlalchemy.orm import Session

from engagement import EngagementMessageRepository
from engagement._operating.lists import list_messages
from engagement.verification import verify

LONG_NUMBER = "9" * 131_072
DEEP = "[" * 3_000 + "]" * 3_000
ENTRIES = {
    "a long number": json.dumps(dict.fromkeys(["at", "attempt", "event", "reason"], 0)).replace("0", LONG_NUMBER),
    "a long attempt": f'{{"at": "2026-11-29T09:00:00+00:00", "attempt": {"9" * 5000}, "event": "in_doubt"}}',
    "a deep one": f'{{"at": {DEEP}, "attempt": {DEEP}, "event": {DEEP}, "reason": {DEEP}}}',
    "as deep as is read": f'{{"reason": {"[" * 450 + "]" * 450}}}',
    "no object": "7",
    "a list": "[[]]",
    "nothing": "null",
    "no moment": '{"at": "yesterday", "attempt": "one", "event": "in_doubt", "reason": {"a": 1}}',
    "no such day": '{"at": "2026-02-31T10:00:00+00:00", "attempt": 1, "event": "in_doubt"}',
    "no such year": '{"at": "0000-01-01T00:00:00+00:00", "attempt": -1, "event": "in_doubt"}',
    "the last year": '{"at": "9999-12-31T23:59:59+15:59", "attempt": 1e300, "event": "in_doubt"}',
    "no zone": '{"at": "2026-11-29T09:00:00", "attempt": 1.5, "event": "in_doubt"}',
    "words": '{"at": {"in": "doubt"}, "attempt": true, "event": ["in_doubt"], "sent": "no", "by": {"x": 1}}',
}


def written(engine, entry: str, params: str = '{"name": "Ana"}') -> tuple[int, int]:
    """Return a message in doubt whose history is the entry, and another one."""
    ids = queue(engine, new_message("a"), new_message("b"))
    execute(
        engine,
        "UPDATE engagement_message_queue SET status = 'in_doubt', attempt = 1, history = CAST(:history AS jsonb),"
        " message_params = CAST(:params AS jsonb) WHERE id = :id",
        history=f"[{entry}]",
        params=params,
        id=ids[0],
    )
    return ids


@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_a_history_by_hand_breaks_no_look(engine, run, entry):
    """It is listed and shown, on the page too, and verified."""
    ids = written(engine, entry)

    with Session(engine) as session:
        assert {message.id for message in list_messages(session)} == set(ids)
        assert EngagementMessageRepository(session).get_message(ids[0]).history
        assert {violation.promise for violation in verify(session)} <= {"history_entries", "attempt_only_grows"}
    for command in (["list"], ["list", "--json"], ["show", ids[0]], ["show", ids[0], "--reveal", "--json"]):
        assert run(*command, on=engine).status == 0
    with admin_of(engine) as page:
        assert page.get(f"messages/{ids[0]}").status_code == 200
        assert page.get("messages").status_code == 200


@pytest.mark.parametrize("sent", [True, False])
@pytest.mark.parametrize("entry", ENTRIES.values(), ids=ENTRIES)
def test_a_history_by_hand_keeps_nobody_from_deciding(engine, entry, sent):
    """Whether it was sent can be said, and then it was sent in the past."""
    message_id, _ = written(engine, entry)
    with Session(engine) as session, session.begin():
        assert EngagementMessageRepository(session).resolve_message(message_id, sent=sent, reason="seen")

    status, is_past = execute(
        engine, "SELECT status, sent_at <= now() FROM engagement_message_queue WHERE id = :id", id=message_id
    ).one()
    assert (status, is_past) == (("sent", True) if sent else ("pending", None))


@pytest.mark.parametrize("params", [f'{{"n": {LONG_NUMBER}}}', f'{{"n": {DEEP}}}', f'{{"n": {"[" * 450 + "]" * 450}}}'])
def test_params_by_hand_break_no_look(engine, run, params):
    """What Python has no value for says so in its place."""
    ids = written(engine, "{}", params)

    with Session(engine) as session:
        assert {message.id for message in list_messages(session)} == set(ids)
    listed = run("list", "--json", "--reveal", on=engine)
    assert (listed.status, len(json.loads(listed.out.splitlines()[0]) and listed.out.splitlines()) >= 1) == (0, True)
    assert run("show", ids[0], "--reveal", on=engine).status == 0
    with admin_of(engine) as page:
        assert page.get(f"messages/{ids[0]}").status_code == 200


def test_a_doubt_is_dated_by_the_day_it_names(engine):
    """Days are counted from the first of the month, in any zone, and leap years have one more."""
    for written_at in (
        "2024-02-29T23:30:00.5+00:00",
        "2026-10-31T01:15:00-05:00",
        "2026-03-29 02:30:00+14",
        "2026-11-29 09:00:00",
    ):
        (message_id,) = queue(engine, new_message(written_at))
        execute(
            engine,
            "UPDATE engagement_message_queue SET status = 'in_doubt', attempt = 1, history = jsonb_build_array("
            "jsonb_build_object('at', CAST(:at AS text), 'attempt', 1, 'event', 'in_doubt')) WHERE id = :id",
            at=written_at,
            id=message_id,
        )
        with Session(engine) as session, session.begin():
            assert EngagementMessageRepository(session).resolve_message(message_id, sent=True)
        assert execute(
            engine,
            "SELECT sent_at = CAST(CAST(:at AS text) AS timestamptz) FROM engagement_message_queue WHERE id = :id",
            at=written_at,
            id=message_id,
        ).scalar_one(), written_at
