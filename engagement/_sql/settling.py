"""Statements that record the verdict of a send, and the traces of a claim that was lost."""

from __future__ import annotations

from functools import cache
from typing import Annotated, Any, TypedDict

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    ColumnElement,
    Executable,
    Float,
    Integer,
    Text,
    and_,
    any_,
    bindparam,
    case,
    cast,
    false,
    func,
    literal_column,
    not_,
    null,
    or_,
    select,
    true,
    update,
)

from engagement._sql.claiming import LOST_WORKERS
from engagement._sql.history import history_with
from engagement._sql.parameters import text_of
from engagement._sql.rows import Rows
from engagement._sql.table import (
    CANCELLED,
    FAILED,
    IN_DOUBT,
    LOCKED,
    MOMENT,
    NOW,
    PENDING,
    QUEUE,
    SENDING,
    SENT,
    C,
    is_forgotten,
    is_wanted,
    number,
    unless_in_doubt,
    word,
)
from engagement.models import MOST_COUNTED


class Settlement(TypedDict):
    """A verdict on its way to SQL: its columns, and the type of each here and there.

    See docs/decisions.md#2026-11-29--a-row-that-crosses-to-sql-is-described-once.
    """

    id: Annotated[int, BigInteger()]
    attempt: Annotated[int, Integer()]
    name: Annotated[str, Text()]
    status: Annotated[str, Text()]
    event: Annotated[str, Text()]
    failures: Annotated[int, Integer()]
    has_doubt: Annotated[bool | None, Boolean()]
    delay: Annotated[float | None, Float()]
    """In seconds."""
    until: Annotated[str | None, MOMENT]
    reason: Annotated[str | None, Text()]
    provider_message_id: Annotated[str | None, Text()]


SETTLEMENTS = Rows(Settlement, "settlements")


@cache
def settle_if_claimed() -> Executable:
    """Record verdicts, one for each message at most, and return (id, status) of those that were recorded.

    Fenced on the attempt and on the name of the claim: one that was lost changes nothing. `Sent` is a fact: it also
    resolves a doubt, stops the next attempt, and corrects a status of unsent, whatever attempt the row has: an earlier
    one, whose claim was lost with a commit, or a later one, since a person called this one unsent. A message that was
    forgotten meanwhile keeps nothing, and is not tried again.
    """
    given = SETTLEMENTS.given().c
    has_doubt = func.coalesce(given.has_doubt, C.has_doubt)
    wanted = case((and_(given.status == PENDING, is_forgotten), CANCELLED), else_=given.status)
    resolves = and_(given.status == SENT, or_(C.status != SENDING, C.claimed_by != given.name))
    reason = case((is_forgotten, null()), else_=given.reason)
    # docs/decisions.md#2026-11-27--a-late-sent-also-corrects-a-mistake
    is_late_but_sent = and_(given.status == SENT, C.status != SENT, not_(_was_given_up(given)))
    return (
        update(QUEUE)
        .values(
            status=unless_in_doubt(wanted, has_doubt),
            # docs/decisions.md#2026-11-29--a-late-sent-counts-whatever-attempt-the-row-has-come-to
            attempt=func.greatest(C.attempt, given.attempt),
            claimed_by=given.name,
            has_doubt=has_doubt,
            lease_expires_at=null(),
            sent_at=case((given.status == SENT, NOW)),
            retry_count=func.least(C.retry_count, number(MOST_COUNTED - 1)) + given.failures,
            next_attempt_at=case((given.status == PENDING, _next_attempt(given)), else_=C.next_attempt_at),
            provider_message_id=case((is_forgotten, null()), else_=given.provider_message_id),
            error_message=case((is_forgotten, null()), else_=func.coalesce(reason, C.error_message)),
            history=case(
                (resolves, history_with(word("resolved"), reason, sent=true())),
                (given.event != SENT, history_with(given.event, reason)),
                else_=C.history,
            ),
        )
        .where(
            C.id == given.id,
            # The fence: a message that was recovered and claimed again has another attempt, or another name.
            # docs/decisions.md#2026-11-29--a-verdict-settles-the-claim-that-it-was-made-under
            or_(
                and_(C.status == SENDING, C.attempt == given.attempt, C.claimed_by == given.name),
                is_late_but_sent,
            ),
        )
        .returning(C.id, C.status)
    )


def _was_given_up(given: Any) -> ColumnElement[bool]:
    """Whether the provider was quicker than the answer, and has said of this attempt that it will not arrive."""
    last = C.history[-1]
    # A history that somebody wrote may have no such entry, and two ids of which one is missing do not differ.
    is_last = func.coalesce(last["event"].astext == word("undeliverable"), false())
    is_of_this = func.coalesce(last["attempt"].astext == cast(given.attempt, Text), false())
    is_its_id = func.coalesce(C.provider_message_id == given.provider_message_id, true())
    return and_(C.status == FAILED, is_last, is_of_this, is_its_id)


def _next_attempt(given: Any) -> ColumnElement[Any]:
    a_second: ColumnElement[Any] = literal_column("interval '1 second'")
    # A transport that postpones into the past would otherwise be asked again without end.
    soonest = NOW + a_second
    delayed = NOW + given.delay * a_second
    return case((given.until.is_not(None), func.greatest(given.until, soonest)), else_=delayed)


@cache
def attempts_of() -> Executable:
    """Return the state of messages whose verdicts were not recorded: (id, attempt, claimed_by, status, event).

    `event` is the last one in the history, if it is one of this attempt. They are locked: to find them recorded by an
    earlier commit would commit nothing, and not wait for a standby that lacks that one.
    """
    entry = C.history[-1]
    is_of_this = entry["attempt"].astext == cast(C.attempt, Text)
    columns = C.id, C.attempt, C.claimed_by, C.status, case((is_of_this, entry["event"].astext)).label("event")
    these = C.id == any_(bindparam("ids", type_=ARRAY(BigInteger)))
    return select(*columns).where(these).order_by(C.id).with_for_update(**LOCKED)


_is_of_another_claim = C.claimed_by.is_distinct_from(text_of("of_name"))
_of_attempt = bindparam("of_attempt", type_=Integer)


@cache
def doubt_if_not_sent() -> Executable:
    """Note that a claim that was lost may have left, unless that is known: the present holder of the message goes on.

    It is not sent again after that, but by an idempotent transport.
    """
    ends = C.status.not_in([PENDING, SENDING])
    return (
        update(QUEUE)
        .where(
            is_wanted, _is_of_another_claim, C.attempt <= _of_attempt, ~C.has_doubt, C.status.not_in([SENT, IN_DOUBT])
        )
        .values(
            status=case((ends, IN_DOUBT), else_=C.status),
            # Who is sending it settles the attempt that it has claimed.
            attempt=case((C.status == SENDING, C.attempt), else_=_of_attempt),
            has_doubt=True,
            history=history_with(IN_DOUBT, case((is_forgotten, null()), else_=text_of("reason"))),
        )
    )


@cache
def tell_sent_twice() -> Executable:
    """Note that two claims of a message were sent, and return its id; nothing if the other one only found that out."""
    found_out = C.claimed_by.regexp_match(word(LOST_WORKERS))
    return (
        update(QUEUE)
        .where(is_wanted, C.status == SENT, _is_of_another_claim, not_(found_out))
        .values(claimed_by=text_of("of_name"), history=history_with(word("sent_twice"), null()))
        .returning(C.id)
    )
