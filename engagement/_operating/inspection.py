"""What a person is shown of the queue: a message's timeline, a page of messages, an overview, activity over time.

It only reads, in the session's transaction, and hides what is personal unless told otherwise. What the command and the
admin page show is worked out here, so that both tell the same.
"""

from __future__ import annotations

import hmac
import re
import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import cache
from operator import itemgetter
from typing import TYPE_CHECKING, Any, TypedDict, Unpack
from uuid import UUID

from sqlalchemy import (
    BigInteger,
    ColumnElement,
    Executable,
    Integer,
    Interval,
    Select,
    Text,
    and_,
    bindparam,
    cast,
    column,
    extract,
    func,
    literal_column,
    select,
    table,
    true,
    union_all,
)
from sqlalchemy.dialects.postgresql import ARRAY, TIMESTAMP

from engagement._sql import claiming, looking
from engagement._sql.host_sessions import in_session, readable, schema_in_session
from engagement._sql.table import (
    FAILED,
    IN_DOUBT,
    NOW,
    PENDING,
    QUEUE,
    SENDING,
    SENT,
    C,
    is_due,
    is_older,
    is_prunable,
    time_since,
)
from engagement.messages import BSUID_FORM, checked_flag, checked_id, checked_moment, checked_text, checked_user_id
from engagement.models import EngagementMessage, MessageStatus, qualified_name

if TYPE_CHECKING:
    from sqlalchemy.orm import Session

# Hiding what is personal ---------------------------------------------------------------------------------------------

HIDDEN = "***"
SHORTEST_NUMBER = 4
"""Of so short an address the last two characters would tell too much."""
_DATE = r"(?:19|20)\d\d-(?:0[1-9]|1[0-2])-[0-3]\d"
_MOMENT = rf"{_DATE}(?:[T ][0-2]\d:[0-5]\d(?::[0-6]\d(?:\.\d{{1,6}})?)?(?:Z|[+-]\d\d:?\d\d)?)?(?!\d)"
_UUID = r"\b[0-9A-Fa-f]{8}(?:-[0-9A-Fa-f]{4}){3}-[0-9A-Fa-f]{12}\b"
_NUMBER = r"[+(]{0,3}\d(?:[\s().+/,_\u200b\u2010-\u2015-]*\d){6,}"
# With a digit, as Meta's ids of people are: else it may be the end of a sentence and the beginning of the next one.
_BSUID = r"\b[A-Z]{2}\.(?:ENT\.)?(?=[A-Za-z]{0,127}\d)[A-Za-z0-9]{1,128}\b"
_PERSONAL = rf"(?P<kept>{_MOMENT}|{_UUID})|{_BSUID}|{_NUMBER}"
_WORD = re.compile(r"\S+")


def masked(text: str, message: EngagementMessage | None = None) -> str:
    """Return a provider's text without what looks like an address or a number of a person.

    If it is of a `message`, also without that message's user, address and key. It takes time in proportion to the text.
    """
    user = None if message is None else message.user_id
    # A key or an address may hold a number; a user may be no more than a part of one.
    for word in [] if message is None else _own_words(message):
        text = re.sub(re.escape(word), HIDDEN, text, flags=re.IGNORECASE)
    users = [] if user is None else _ways_to_write(user)
    # Only of a text that names the user: to compile a pattern takes longer than to search with it.
    named = [re.escape(way) for way in users if way in text.casefold()]
    pattern = "|".join([_PERSONAL, *(f"(?i:{way})" for way in named)])
    text = re.sub(
        pattern,
        lambda found: found["kept"] if found["kept"] and found["kept"].casefold() not in users else HIDDEN,
        text,
    )
    # Word by word: a pattern that looks for the @ of an address would do so from every character of a long word.
    return _WORD.sub(_hidden_if_address, text)


def _own_words(message: EngagementMessage) -> list[str]:
    address = message.destination_jid or ""
    number = address.rpartition(".")[2]
    is_business_scoped = BSUID_FORM.fullmatch(address) and len(number) > SHORTEST_NUMBER
    # Of Meta's id a provider may leave the country out.
    return [word for word in (message.idempotency_key, address, number if is_business_scoped else "") if word]


def _ways_to_write(user_id: str) -> list[str]:
    """Return how a user may stand in a text, in small letters: a UUID also without its hyphens."""
    user = user_id.casefold()
    return [user, user.replace("-", "")] if re.fullmatch(_UUID, user) else [user]


def _hidden_if_address(word: re.Match[str]) -> str:
    return HIDDEN if "@" in word[0][1:-1] else word[0]


def mask_address(jid: str | None) -> str | None:
    """Return an address with all hidden but its kind, and the last two digits of a long number.

    `***99@s.whatsapp.net`; of Meta's id of a person `***43`.
    """
    if jid is None:
        return None
    number, at, domain = jid.rpartition("@") if "@" in jid else (jid.rpartition(".")[2], "", "")
    return f"{HIDDEN}{number[-2:] if len(number) > SHORTEST_NUMBER else ''}{at}{domain}"


_OF_THIS_PROCESS = secrets.token_bytes(32)


def pseudonym(user_id: str, key: bytes = _OF_THIS_PROCESS) -> str:
    """Return eight characters that are the same for all messages of a user, and do not say who it is.

    They follow from `key`, a secret: of a plain hash, whoever tries all telephone numbers finds the one. Without a key
    they are the same as long as this process runs.
    """
    return hmac.digest(key, user_id.encode(), "sha256")[:4].hex()


# One message ---------------------------------------------------------------------------------------------------------

NOT_KEPT = "unknown"
_OUTCOMES = frozenset({"not_sent", "in_doubt", "refused", "postponed", "withdrawn", "resolved"})
_BLANKINGS = frozenset({"forgotten", "pruned"})
_EVENTS = _OUTCOMES | _BLANKINGS | {"cancelled", "expired", "not_ready", "retried", "sent_twice"}


@dataclass(frozen=True, slots=True)
class Moment:
    """Something that happened to a message, or is to happen. `at` is None if nobody recorded when."""

    at: datetime | None
    what: str
    """`queued`, `scheduled`, `claimed`, `sent`, an event of the history, what is to come (`due`, `lease_ends`,
    `expires`), or `unknown`."""
    attempt: int | None
    detail: str | None


def timeline(message: EngagementMessage, *, reveal: bool = False) -> list[Moment]:
    """Return what is known of a message's life, in order; what is not known is said at its place.

    Providers' reasons are `masked` unless `reveal`. A history holds what went other than well: neither when a message
    was claimed nor that it was rescheduled is recorded.
    """
    reveal = checked_flag("reveal", reveal)
    history = [_recorded(entry, message, reveal=reveal) for entry in message.history]
    known = [
        (message.created_at, Moment(message.created_at, "queued", None, None)),
        *_lost_attempts(message, history),
        *history,
    ]
    if message.status != MessageStatus.PENDING or message.next_attempt_at != message.scheduled_for:
        known.append((message.scheduled_for, Moment(message.scheduled_for, "scheduled", None, None)))
    match message.status:
        case MessageStatus.PENDING:
            known += _still_to_come(message)
        case MessageStatus.SENDING:
            known += _in_hand(message, max(at for at, _ in history + known[:1]))
        case MessageStatus.SENT:
            known.append((_sent_at(message), _sent(message, history)))
        case ended:
            if all(moment.what in _BLANKINGS for _, moment in history):
                lost = Moment(None, str(ended), message.attempt or None, "when and why is not kept")
                known.insert(1, (message.created_at, lost))
    return [moment for _, moment in sorted(known, key=itemgetter(0))]


def _recorded(entry: Any, message: EngagementMessage, *, reveal: bool) -> tuple[datetime, Moment]:
    """Return an entry of a history and its place, also if somebody wrote it by hand."""
    try:
        at, detail = datetime.fromisoformat(entry["at"]), _detail(entry)
        detail = detail if reveal or detail is None else masked(detail, message)
        # A word that is not ours may be anything, also personal.
        event = entry["event"] if entry["event"] in _EVENTS else NOT_KEPT
        return at.astimezone(UTC), Moment(at, event, int(entry["attempt"]), detail)
    except (ArithmeticError, AttributeError, KeyError, TypeError, ValueError):
        return message.created_at, Moment(None, NOT_KEPT, None, "an entry of its history cannot be read")


def _detail(entry: Mapping[str, Any]) -> str | None:
    """Return what was decided, by whom, and why: `not sent, by ana: asked the provider`; None of what is not kept."""
    sent, by, reason = entry.get("sent"), entry.get("by"), entry.get("reason")
    decided = "sent" if sent is True else "not sent" if sent is False else None
    decision = ", ".join(filter(None, (decided, by and f"by {by}")))
    return ": ".join(filter(None, (decision, reason and str(reason)))) or None


def _lost_attempts(
    message: EngagementMessage, history: Sequence[tuple[datetime, Moment]]
) -> Iterator[tuple[datetime, Moment]]:
    told = {moment.attempt for _, moment in history if moment.what in _OUTCOMES}
    if message.status in {MessageStatus.SENDING, MessageStatus.SENT}:
        told.add(message.attempt)
    lost = message.attempt - len(told)
    if lost > 0:
        attempts = "1 attempt" if lost == 1 else f"{lost} attempts"
        yield message.created_at, Moment(None, NOT_KEPT, None, f"what became of {attempts} is not kept")


def _still_to_come(message: EngagementMessage) -> Iterator[tuple[datetime, Moment]]:
    doubt = "an earlier attempt may have left" if message.has_doubt else None
    yield message.next_attempt_at, Moment(message.next_attempt_at, "due", message.attempt + 1, doubt)
    if message.expires_at is not None:
        yield message.expires_at, Moment(message.expires_at, "expires", None, "if not claimed by then")


def _in_hand(message: EngagementMessage, latest: datetime) -> Iterator[tuple[datetime, Moment]]:
    since = max(latest, message.next_attempt_at)
    yield since, Moment(None, "claimed", message.attempt, f"{_by(message)}, when is not recorded")
    if message.lease_expires_at is not None:
        yield message.lease_expires_at, Moment(message.lease_expires_at, "lease_ends", message.attempt, None)


def _sent(message: EngagementMessage, history: Sequence[tuple[datetime, Moment]]) -> Moment:
    is_found_out = any(moment.what == "resolved" and at > _sent_at(message) for at, moment in history)
    detail = "at the latest, as was found out later" if is_found_out else _by(message)
    return Moment(message.sent_at, "sent", message.attempt, detail)


def _sent_at(message: EngagementMessage) -> datetime:
    assert message.sent_at is not None
    return message.sent_at


def _by(message: EngagementMessage) -> str:
    return f"by {message.claimed_by or 'an unnamed worker'}"


# Many messages -------------------------------------------------------------------------------------------------------


class Filters(TypedDict, total=False):
    """Which messages: all that fit every filter given. Moments are aware; `since` is included, `until` is not."""

    status: Sequence[MessageStatus | str]
    user_id: str | UUID
    message_type: str
    created_since: datetime
    created_until: datetime
    scheduled_since: datetime
    scheduled_until: datetime
    blanked: bool
    """Whether what is personal was forgotten or pruned."""


def list_messages(
    session: Session,
    *,
    before: int | None = None,
    after: int | None = None,
    limit: int = 50,
    schema: str | None = None,
    **filters: Unpack[Filters],
) -> list[EngagementMessage]:
    """Return up to `limit` messages, the newest first: the newest of all, or the next ones `before` or `after` an id.

    The next page begins `before` the last id of this one; a page that is not full is the last. A user's messages and
    those of the statuses pending, sending, failed and in_doubt are found by an index. Otherwise the table is read from
    its newest message on until the page is full: all of it, up to a second for a million, if hardly any message fits.
    """
    if not 1 <= limit <= LONGEST_PAGE:
        raise ValueError(f"limit: must be from 1 to {LONGEST_PAGE}")
    chosen = select(EngagementMessage).where(*_conditions(filters))
    if before is not None:
        chosen = chosen.where(C.id < checked_id(before))
    if after is not None:
        chosen = chosen.where(C.id > checked_id(after))
    is_upwards = after is not None and before is None
    page = chosen.order_by(C.id if is_upwards else C.id.desc()).limit(limit)
    # What the session loaded earlier may have been changed by a worker since.
    keywords = in_session(schema)
    with readable(session):
        found = session.scalars(page.execution_options(populate_existing=True), **keywords).all()
    return list(reversed(found)) if is_upwards else list(found)


def count_messages(session: Session, *, schema: str | None = None, **filters: Unpack[Filters]) -> int:
    """Return how many messages fit. Indexed as `list_messages` is; otherwise it reads the whole table."""
    counted = select(func.count()).select_from(QUEUE).where(*_conditions(filters))
    return int(session.execute(counted, **in_session(schema)).scalar_one())


def message_ids(
    session: Session, *, after: int, up_to: int, limit: int, schema: str | None = None, **filters: Unpack[Filters]
) -> list[int]:
    """Return the ids of the next messages that fit after one and up to another, the oldest first."""
    chosen = select(C.id).where(*_conditions(filters), C.id > after, C.id <= up_to).order_by(C.id).limit(limit)
    return list(session.execute(chosen, **in_session(schema)).scalars())


def count_prunable(session: Session, older_than: timedelta, *, schema: str | None = None) -> int:
    """Return how many messages `prune_messages` would blank. Read by its index."""
    counted = select(func.count()).select_from(QUEUE).where(is_prunable, is_older)
    values = {"older_than": older_than}
    return int(session.execute(counted, values, **in_session(schema)).scalar_one())


LONGEST_PAGE = 10_000


def _conditions(filters: Filters) -> Iterator[ColumnElement[bool]]:
    if statuses := filters.get("status"):
        # Literals: PostgreSQL cannot prove that a parameter matches a partial index.
        words = [literal_column(f"'{MessageStatus(status)}'", Text) for status in statuses]
        yield words[0] == C.status if len(words) == 1 else C.status.in_(words)
    if (user_id := filters.get("user_id")) is not None:
        yield C.user_id == checked_user_id(user_id)
    if (message_type := filters.get("message_type")) is not None:
        yield C.message_type == checked_text("message_type", message_type)
    if (blanked := filters.get("blanked")) is not None:
        yield C.destination_jid.is_(None) if blanked else C.destination_jid.is_not(None)
    for name, moment in (("created", C.created_at), ("scheduled", C.scheduled_for)):
        if (since := filters.get(f"{name}_since")) is not None:
            yield moment >= checked_moment(f"{name}_since", since)
        if (until := filters.get(f"{name}_until")) is not None:
            yield moment < checked_moment(f"{name}_until", until)


# All of it -----------------------------------------------------------------------------------------------------------

RATE_OVER = timedelta(hours=1)
RATE_ROWS = 10_000


@dataclass(frozen=True, slots=True, kw_only=True)
class Overview:
    """How the queue stands. Ages and leases are by the database's clock."""

    by_status: Mapping[MessageStatus, int]
    is_rough: bool
    """Whether what is finished, and what reached `count_up_to`, is estimated."""
    due: int
    oldest_due: timedelta | None
    """How long the oldest due message has been waiting."""
    waiting_for: str | None
    """What it waits for, if a worker's transport has said why it is not ready."""
    queued_per_minute: float
    """Over the last hour, or as far back as the newest 10,000 messages reach: an estimate, by id."""
    sent_per_minute: float
    """Likewise, by when they were due: what was sent of an older backlog after newer messages may be missed."""
    leases_expired: int
    """Of the messages that are `sending`, how many have lost their worker, and wait to be recovered."""
    pending_in_doubt: int
    """Of the pending messages, how many may have left before."""
    oldest_in_doubt: timedelta | None
    """How long ago the oldest message in doubt was last due."""
    table_bytes: int
    index_bytes: int
    dead_rows: int
    """As the statistics of PostgreSQL estimate it; a replica knows none."""
    last_vacuum: datetime | None


def overview(session: Session, *, schema: str | None = None, count_up_to: int | None = None) -> Overview:
    """Return how the queue stands.

    The counts are exact and read the narrowest whole index (an index-only scan, while the table is vacuumed); all else
    is read by partial indexes, from at most 10,000 rows, or from PostgreSQL's own statistics.

    With `count_up_to`, a table that has more rows is not counted: what is finished is then estimated by the statistics,
    and all else is counted so far and no further. `pending_in_doubt` speaks of as many pending messages.
    """
    keywords = in_session(schema)
    queue = {"queue": qualified_name(schema_in_session(schema, session))}
    values = {"over": RATE_OVER, "rows": RATE_ROWS, "most": count_up_to}
    facts = session.execute(_queue_facts(), values, **keywords).one()
    counts = {} if count_up_to is None else _count_roughly(session, queue | values, keywords)
    is_rough = bool(counts)
    if not counts:
        found = session.execute(looking.count_by_status(), **keywords)
        counts = {word: count for word, count, _ in found}
    with readable(session):
        table_facts = session.execute(_table_facts(), queue, **keywords).one()
    return Overview(
        by_status=dict.fromkeys(MessageStatus, 0) | {MessageStatus(word): count for word, count in counts.items()},
        is_rough=is_rough,
        queued_per_minute=_per_minute(facts.queued, facts.queued_over),
        sent_per_minute=_per_minute(facts.sent, facts.sent_over),
        due=facts.due,
        oldest_due=facts.oldest_due,
        waiting_for=facts.waiting_for and masked(facts.waiting_for),
        leases_expired=facts.leases_expired,
        pending_in_doubt=facts.pending_in_doubt,
        oldest_in_doubt=facts.oldest_in_doubt,
        **table_facts._mapping,  # noqa: SLF001 - the public name of a row's mapping
    )


def _count_roughly(session: Session, values: Mapping[str, Any], keywords: Mapping[str, Any]) -> dict[str, int]:
    """Return counts that read little; none if the table is small, or the planner has not looked at it."""
    counts: dict[str, int] = {row.word: row.counted for row in session.execute(_estimates(), values, **keywords)}
    if counts:
        for word, count in session.execute(_counts_of_unfinished(), values, **keywords):
            # Where counting was broken off, the estimate may know more.
            counts[word] = max(count, counts.get(word, 0)) if count == values["most"] else count
    return counts


@cache
def _estimates() -> Executable:
    """Return (status, count) as the planner believes, if the table has more than `most` rows; else nothing."""
    of_relation = ("oid", "reltuples", "relname", "relnamespace")
    of_statistics = ("schemaname", "tablename", "attname", "most_common_vals", "most_common_freqs")
    relation = table("pg_class", *map(column, of_relation), schema="pg_catalog")
    namespace = table("pg_namespace", *map(column, ("oid", "nspname")), schema="pg_catalog")
    statistics = table("pg_stats", *map(column, of_statistics), schema="pg_catalog")
    words = cast(cast(statistics.c.most_common_vals, Text), ARRAY(Text))
    common = func.unnest(words, statistics.c.most_common_freqs).table_valued("word", "share").render_derived("common")
    return (
        select(common.c.word, cast(relation.c.reltuples * common.c.share, BigInteger).label("counted"))
        .select_from(relation)
        .join(namespace, namespace.c.oid == relation.c.relnamespace)
        .join(
            statistics,
            and_(statistics.c.schemaname == namespace.c.nspname, statistics.c.tablename == relation.c.relname),
        )
        .join(common, true())
        .where(
            relation.c.oid == func.to_regclass(bindparam("queue", type_=Text)),
            relation.c.reltuples > bindparam("most", type_=BigInteger),
            statistics.c.attname == "status",
        )
    )


@cache
def _counts_of_unfinished() -> Executable:
    """Return (status, count) of those that have an index of their own, each counted to `most`."""
    words = (PENDING, SENDING, FAILED, IN_DOUBT)
    return union_all(*(select(word, _count_up_to_most(C.status == word).scalar_subquery()) for word in words))


def _count_up_to_most(condition: ColumnElement[bool]) -> Select[Any]:
    """Return how many rows fit, counted to `most`; to the end if that is NULL."""
    some: Select[Any] = select(literal_column("1")).select_from(QUEUE).where(condition)
    return select(func.count()).select_from(some.limit(bindparam("most", type_=BigInteger)).subquery())


def _per_minute(count: int, over: timedelta | None) -> float:
    if not count or over is None:
        return 0.0
    # Over the whole hour, unless the rows that were read do not reach back so far.
    span = RATE_OVER if count < RATE_ROWS else over
    return count / max(span.total_seconds(), 1) * 60


@cache
def _queue_facts() -> Executable:
    long_ago = NOW - bindparam("over", type_=Interval)
    rows = bindparam("rows", type_=BigInteger)
    newest = select(C.created_at.label("at")).order_by(C.id.desc()).limit(rows).subquery("newest")
    last_sent = (
        select(C.sent_at.label("at"))
        # A cancelled message may be due in a year; a sent one was due.
        .where(is_prunable, C.status == SENT, C.next_attempt_at <= NOW)
        .order_by(C.next_attempt_at.desc())
        .limit(rows)
        .subquery("last_sent")
    )
    pending = select(C.has_doubt).where(C.status == PENDING).limit(bindparam("most", type_=BigInteger)).subquery()
    questions: dict[str, Select[Any]] = {
        "due": _count_up_to_most(is_due),
        "oldest_due": select(time_since(func.min(C.next_attempt_at))).where(is_due),
        "waiting_for": claiming.waiting_for(),
        "leases_expired": select(func.count()).where(C.status == SENDING, C.lease_expires_at <= NOW),
        "pending_in_doubt": select(func.count()).select_from(pending).where(pending.c.has_doubt),
        "oldest_in_doubt": select(time_since(func.min(C.next_attempt_at))).where(C.status == IN_DOUBT),
    }
    for name, found in (("queued", newest), ("sent", last_sent)):
        questions[name] = select(func.count()).select_from(found).where(found.c.at > long_ago)
        questions[f"{name}_over"] = select(time_since(func.min(found.c.at))).where(found.c.at > long_ago)
    return select(*(question.scalar_subquery().label(name) for name, question in questions.items()))


@cache
def _table_facts() -> Executable:
    queue = func.to_regclass(bindparam("queue", type_=Text))
    statistics = table(
        "pg_stat_all_tables",
        *(column(name) for name in ("relid", "n_dead_tup", "last_vacuum", "last_autovacuum")),
        schema="pg_catalog",
    )
    return select(
        func.pg_table_size(queue, type_=BigInteger).label("table_bytes"),
        func.pg_indexes_size(queue, type_=BigInteger).label("index_bytes"),
        statistics.c.n_dead_tup.label("dead_rows"),
        func.greatest(statistics.c.last_vacuum, statistics.c.last_autovacuum).label("last_vacuum"),
    ).where(statistics.c.relid == queue)


# Over time -----------------------------------------------------------------------------------------------------------

MOST_BUCKETS = 2_000
LATEST_SEND = timedelta(days=2)


@dataclass(frozen=True, slots=True)
class Activity:
    """What was due, and what was sent, in the bucket that begins `at`."""

    at: datetime
    due: int
    sent: int


def activity(session: Session, since: datetime, bucket: timedelta, *, schema: str | None = None) -> list[Activity]:
    """Return what was due and what was sent since then, bucket by bucket until now, zeros included.

    Read by the partial indexes on when messages were last due, which leave out what was forgotten or pruned. A message
    that was sent more than two days after it was due is only counted as sent if it was due in this time.
    """
    checked_moment("since", since)
    if bucket <= timedelta(0):
        raise ValueError("bucket: must be more than nothing")
    keywords = in_session(schema)
    values = {"since": since, "bucket": bucket, "latest": LATEST_SEND}
    past: timedelta = session.execute(_time_since(), values, **keywords).scalar_one()
    if (buckets := past // bucket + 1) > MOST_BUCKETS:
        raise ValueError(f"bucket: makes {buckets} buckets, more than {MOST_BUCKETS}")
    rows = session.execute(_activity(), values, **keywords)
    counts = {number: (due, sent) for number, due, sent in rows}
    return [Activity(since + number * bucket, *counts.get(number, (0, 0))) for number in range(buckets)]


@cache
def _time_since() -> Executable:
    return select(time_since(bindparam("since", type_=TIMESTAMP(timezone=True))))


@cache
def _activity() -> Executable:
    since = bindparam("since", type_=TIMESTAMP(timezone=True))
    is_recent = and_(since <= C.next_attempt_at, C.next_attempt_at <= NOW)
    was_due = select(C.next_attempt_at.label("at"), literal_column("1").label("due"), literal_column("0").label("sent"))
    was_sent = select(C.sent_at, literal_column("0"), literal_column("1"))
    latest = bindparam("latest", type_=Interval)
    seen = union_all(
        # One for each index: with OR, the planner reads the whole table.
        was_due.where(C.status == PENDING, is_recent),
        was_due.where(C.status == SENDING, is_recent),
        was_due.where(C.status == IN_DOUBT, is_recent),
        was_due.where(is_prunable, is_recent),
        was_sent.where(
            is_prunable,
            C.status == SENT,
            and_(since - latest <= C.next_attempt_at, C.next_attempt_at <= NOW),
            C.sent_at >= since,
        ),
    ).subquery("seen")
    bucket = bindparam("bucket", type_=Interval)
    number = func.floor(extract("epoch", seen.c.at - since) / extract("epoch", bucket)).cast(Integer)
    return select(number, func.sum(seen.c.due), func.sum(seen.c.sent)).group_by(number)
