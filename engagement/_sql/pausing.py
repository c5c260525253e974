"""Statements of the pauses, and the condition by which a claim obeys them."""

from __future__ import annotations

from functools import cache
from typing import Any

from sqlalchemy import (
    ARRAY,
    ColumnElement,
    Executable,
    Select,
    Table,
    Text,
    and_,
    any_,
    bindparam,
    case,
    cast,
    delete,
    func,
    not_,
    or_,
    select,
)
from sqlalchemy.dialects.postgresql import insert

from engagement._sql.parameters import text_of, unseen
from engagement._sql.table import MOMENT, NOW, C, number, word
from engagement.models import EngagementPause

PAUSES: Table = EngagementPause.__table__  # type: ignore[assignment]  # declared as FromClause
P = PAUSES.c
EVERYTHING, TYPE, SENDER = (word(scope) for scope in ("everything", "type", "sender"))
is_in_force = or_(P.until.is_(None), P.until > NOW)
_is_this = and_(P.scope == text_of("of_scope"), P.name == text_of("of_name"))
# Of everything, or of the worker's sender: no parameter of a statement is named as a column.
_stops_the_worker = or_(P.scope == EVERYTHING, and_(P.scope == SENDER, P.name == unseen(text_of("of_sender"))))
SHOWN = (P.scope, P.name, P.reason, P.paused_by, P.since, P.until)


@cache
def pause() -> Executable:
    """Pause a scope until a moment, or until it is lifted. Returns nothing, and does nothing, if that has passed.

    One that is paused already is so since then, with the reason, the author and the moment that are given now.
    """
    until = bindparam("of_until", type_=MOMENT)
    given = select(text_of("of_scope"), text_of("of_name"), text_of("of_reason"), text_of("of_author"), NOW, until)
    added = insert(PAUSES).from_select(
        ["scope", "name", "reason", "paused_by", "since", "until"], given.where(or_(until.is_(None), until > NOW))
    )
    return added.on_conflict_do_update(
        index_elements=[P.scope, P.name],
        set_={
            "reason": added.excluded.reason,
            "paused_by": added.excluded.paused_by,
            "since": case((is_in_force, P.since), else_=added.excluded.since),
            "until": added.excluded.until,
        },
    ).returning(*SHOWN)


@cache
def resume() -> Executable:
    """Lift a pause; return whether it was in force."""
    return delete(PAUSES).where(_is_this).returning(is_in_force)


@cache
def in_force() -> Executable:
    """Return the pauses that are in force, that of everything first."""
    return select(*SHOWN).where(is_in_force).order_by(P.scope != EVERYTHING, P.scope.desc(), P.name)


def unless_paused() -> tuple[ColumnElement[bool], ColumnElement[bool]]:
    """Return the conditions of a message that no pause holds back, for the worker of `of_sender`.

    The pauses are read once for each statement, and not for each row.
    See docs/decisions.md#2026-11-30--a-pause-is-a-row-that-each-claim-reads.
    """
    return worker_goes_on(), type_goes_on()


def worker_goes_on() -> ColumnElement[bool]:
    """Whether neither everything nor the worker's sender is paused. Else no message is looked at."""
    return not_(select(P.scope).where(is_in_force, _stops_the_worker).exists())


def type_goes_on() -> ColumnElement[bool]:
    """Whether the type of a message is not paused."""
    types = select(P.name).where(P.scope == TYPE, is_in_force).scalar_subquery()
    is_paused = C.message_type == any_(cast(func.array(types), ARRAY(Text)))
    # A CASE, into which the planner does not see. It believes in ten paused types, and where few types are stored, that
    # nothing is left of them: then it would read and sort all that is due, for each claim.
    return case((is_paused, number(0)), else_=number(1)) != number(0)


def of_the_worker(*of_types: ColumnElement[bool]) -> Select[Any]:
    """Select the pauses that hold back the worker of `of_sender`, which takes types that fit `of_types`."""
    return select(PAUSES).where(is_in_force, or_(_stops_the_worker, and_(P.scope == TYPE, *of_types)))


def first_end(paused: Select[Any], latest: ColumnElement[Any]) -> ColumnElement[Any]:
    """Return when the first of these pauses ends by itself, before `latest`."""
    return paused.with_only_columns(func.min(P.until)).where(P.until <= latest).scalar_subquery()


def named(paused: Select[Any]) -> ColumnElement[Any]:
    """Return these pauses as an array of texts (`everything`, `type campaign`)."""
    text = func.concat_ws(word(" "), P.scope, func.nullif(P.name, word("")))
    return cast(func.array(paused.with_only_columns(text).scalar_subquery()), ARRAY(Text))
