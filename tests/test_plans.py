"""No statement reads the whole table."""

import re
from datetime import timedelta

import pytest
from by_hand import HOLDER, NOON, claim, repeat, take_turns
from conftest import database_url, new_message
from pytest_postgresql.janitor import DatabaseJanitor
from sqlalchemy import create_engine, event, text
from sqlalchemy.orm import Session

from engagement import EngagementMessageRepository, SuppressionList
from engagement._delivery import database as claims
from engagement._delivery.taking import ALL_TYPES, Types
from engagement._operating.flow import flows
from engagement._operating.suppressed import list_suppressed
from engagement._receiving.keeping import take_matching
from engagement._sql.host_sessions import HostSession
from engagement.models import MessageStatus
from engagement.outcomes import Verdict

FINISHED_ROWS = 100_000
"""They stand for five million: the plans that are chosen for these are chosen for more all the more."""
SOME_TYPES = (Types("only", frozenset({"goodbye", "otp"})), Types("but", frozenset({"campaign"})))
FILL = """
INSERT INTO engagement_message_queue (user_id, message_type, message_key, message_params, destination, destination_jid,
    scheduled_for, next_attempt_at, status, attempt, sent_at, idempotency_key)
SELECT 'user' || n % 5000, 'goodbye', 'goodbye.14_days', jsonb_build_object('text', repeat('x', 200)), 'individual',
    5500000000000 + n || '@s.whatsapp.net', moment, moment, status, 1, CASE WHEN status = 'sent' THEN moment END, n
FROM (
    SELECT n, now() - CASE WHEN n % 50 = 0 THEN -n ELSE n END * interval '1 minute' AS moment,
        CASE WHEN n % 25 = 0 THEN 'pending' WHEN n % 100 = 1 THEN 'in_doubt'
            ELSE (ARRAY['sent', 'sent', 'cancelled', 'failed'])[1 + n % 4] END AS status
    FROM generate_series(1, :count) AS n
) AS given
"""
SUPPRESS = """
INSERT INTO engagement_suppression (address_hash, reason, since, until)
SELECT encode(sha256(convert_to(5500000000000 + n || '@s.whatsapp.net', 'UTF8')), 'hex'), 'answered STOP',
    now() - n * interval '1 minute', CASE WHEN n % 10 = 0 THEN now() - interval '1 second' END
FROM generate_series(1, :count) AS n
"""


@pytest.fixture(scope="module", name="full_engine")
def _full_engine(migrated_template):
    """An engine on a database with many finished messages, and some that are pending."""
    name = f"{migrated_template.dbname}_full"
    janitor = DatabaseJanitor(
        user=migrated_template.user,
        host=migrated_template.host,
        port=migrated_template.port,
        password=migrated_template.password,
        dbname=name,
        template_dbname=migrated_template.template_dbname,
        maintenance_dbname=migrated_template.maintenance_dbname,
    )
    janitor.drop()
    with janitor:
        engine = create_engine(database_url(migrated_template, name))
        with engine.begin() as connection:
            connection.execute(text(FILL), {"count": FINISHED_ROWS})
            connection.execute(text(SUPPRESS), {"count": FINISHED_ROWS})
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.execute(text("VACUUM ANALYZE engagement_message_queue, engagement_suppression"))
        yield engine
        engine.dispose()


def generic_plan(session: Session, work) -> list[tuple[str, str]]:
    """Return (node, index) of the plan that serves any values, of the last statement that `work(session)` executes."""
    executed = []
    connection = session.connection()
    event.listen(
        connection,
        "before_cursor_execute",
        lambda _c, _cursor, statement, parameters, *_: executed.append((statement, parameters)),
    )
    work(session)
    statement, parameters = executed[-1]
    names = list(dict.fromkeys(re.findall(r"%\((\w+)\)s", statement)))
    numbered = re.sub(r"%\((\w+)\)s", lambda match: f"${names.index(match[1]) + 1}", statement).replace("%%", "%")
    types = ["interval" if isinstance(parameters[name], timedelta) else "unknown" for name in names]
    arguments, nulls = (f"({', '.join(words)})" if names else "" for words in (types, ["NULL"] * len(names)))
    connection.exec_driver_sql("SET LOCAL plan_cache_mode = force_generic_plan")
    connection.exec_driver_sql(f"PREPARE explained{arguments} AS {numbered}")
    plan = connection.exec_driver_sql(f"EXPLAIN (FORMAT JSON) EXECUTE explained{nulls}").scalar_one()[0]["Plan"]
    connection.exec_driver_sql("DEALLOCATE explained")
    session.rollback()
    return list(_reads(plan))


def _reads(plan: dict):
    if plan.get("Relation Name", "").startswith(("pg_", "engagement_pause")):  # They are small.
        return
    if "Index Name" in plan or (plan["Node Type"] != "ModifyTable" and "Relation Name" in plan):
        yield plan["Node Type"], plan.get("Index Name", "").removeprefix("engagement_message_queue_")
    for inner in plan.get("Plans", ()):
        yield from _reads(inner)


@pytest.mark.parametrize(
    ("work", "indexes"),
    [
        pytest.param(claim, {"due"}, id="claim"),
        *(
            pytest.param(lambda session, types=types: claim(session, types), {"due"}, id=f"claim {types.which}")
            for types in SOME_TYPES
        ),
        *(
            pytest.param(work, {"due", "lease"}, id=f"{name} {types.which}")
            for types in (ALL_TYPES, *SOME_TYPES)
            for name, work in (
                ("take turns", lambda session, types=types: take_turns(session, types)),
                ("claim in order", lambda session, types=types: claim(session, types, in_order=True)),
            )
        ),
        *(
            pytest.param(
                lambda session, types=types: claims.look_ahead(session.connection(), (NOON, 7), types),
                {"due", "lease"},
                id=f"peek {types.which}",
            )
            for types in SOME_TYPES
        ),
        *(
            pytest.param(
                lambda session, types=types: claims.take_over(
                    session.connection(), HOLDER, limit=9, held=[], types=types
                ),
                {"lease", "pkey"},
                id=f"take over {types.which}",
            )
            for types in SOME_TYPES
        ),
        *(
            pytest.param(
                lambda session, types=types: claims.note_not_ready(session.connection(), reason="x", types=types),
                {"due", "pkey"},
                id=f"not ready {types.which}",
            )
            for types in SOME_TYPES
        ),
        pytest.param(
            lambda session: claims.take_over(session.connection(), HOLDER, limit=9, held=[]),
            {"lease", "pkey"},
            id="take over",
        ),
        pytest.param(
            lambda session: claims.adopt(session.connection(), HOLDER, names=["x"]), {"lease", "pkey"}, id="adopt"
        ),
        pytest.param(lambda session: claims.look_ahead(session.connection(), (NOON, 7)), {"due", "lease"}, id="peek"),
        pytest.param(lambda session: claims.messages(session.connection(), [1, 2]), {"pkey"}, id="settled by receipts"),
        pytest.param(repeat("get_message", 1), {"pkey"}, id="get"),
        pytest.param(repeat("get_message_by_key", "1"), {"idempotency_key_key"}, id="get by key"),
        pytest.param(repeat("get_pending_messages", "user7"), {"user"}, id="get pending"),
        pytest.param(repeat("cancel_message", 1), {"pkey"}, id="cancel"),
        pytest.param(repeat("cancel_pending_messages", "user7"), {"user", "pkey"}, id="cancel pending"),
        pytest.param(repeat("cancel_pending_messages", "user7", "goodbye"), {"user", "pkey"}, id="cancel one type"),
        pytest.param(repeat("reschedule_message", 1, NOON), {"pkey"}, id="reschedule"),
        pytest.param(repeat("retry_message", 1), {"pkey"}, id="retry"),
        pytest.param(repeat("resolve_message", 1, sent=False), {"pkey"}, id="resolve"),
        pytest.param(repeat("forget_user", "user7"), {"user", "pkey", "engagement_suppression_pkey"}, id="forget"),
        pytest.param(
            lambda session: SuppressionList(session).unsuppress("5511999990001@s.whatsapp.net"),
            {"engagement_suppression_pkey"},
            id="unsuppress",
        ),
        pytest.param(
            lambda session: SuppressionList(session).find("5511999990001@s.whatsapp.net"),
            {"engagement_suppression_pkey"},
            id="find in the suppression list",
        ),
        pytest.param(repeat("prune_messages", timedelta(days=30)), {"prunable", "pkey"}, id="prune"),
        pytest.param(repeat("count_by_status"), {"user", "due"}, id="count"),
        pytest.param(flows, {"pkey", "sent"}, id="the last minutes"),
    ],
)
def test_no_statement_reads_the_whole_table(full_engine, work, indexes):
    """Each statement, planned for any values, finds its rows by an index however many messages are finished."""
    with Session(full_engine) as session:
        reads = generic_plan(session, work)

    assert {index for node, index in reads if index} == indexes
    assert not [node for node, _ in reads if node == "Seq Scan"]


def test_kept_receipts_look_their_messages_up(full_engine):
    """However many are kept, the queue is read by the index of providers' ids."""
    with Session(full_engine) as session:
        kept = "SELECT 'id-' || n, 'read', now(), 'waha', false FROM generate_series(1, 50000) AS n"
        columns = "provider_message_id, event, at, provider, unreachable"
        session.execute(text(f"INSERT INTO engagement_receipt ({columns}) {kept}"))
        session.execute(text("ANALYZE engagement_receipt"))
        reads = generic_plan(session, lambda session: take_matching(HostSession(session, None), timedelta(days=1)))

    assert [index for node, index in reads if node != "Seq Scan" and index] == ["provider"]
    assert [node for node, _ in reads].count("Seq Scan") == 1  # The kept ones.


def test_counting_reads_an_index_instead_of_the_table(full_engine):
    """The counts come from the index of users and statuses alone."""
    with Session(full_engine) as session:
        reads = generic_plan(session, repeat("count_by_status"))

    assert ("Index Only Scan", "user") in reads


def test_a_page_of_the_suppression_list_sorts_no_more_than_it_shows(full_engine):
    """It reads the list, which is counted anyway, and nothing else, and keeps the newest entries only."""
    executed = []
    with Session(full_engine) as session:
        connection = session.connection()
        event.listen(connection, "before_cursor_execute", lambda _c, _cursor, *of, **_: executed.append(of[:2]))
        page = list_suppressed(session, limit=50)
        plans = [
            connection.exec_driver_sql(f"EXPLAIN (ANALYZE, FORMAT JSON) {statement}", parameters).scalar_one()[0][
                "Plan"
            ]
            for statement, parameters in list(executed)
        ]

    nodes = [node for plan in plans for node in _nodes(plan)]
    assert (page.count, len(page.entries)) == (FINISHED_ROWS * 9 // 10, 50)
    assert page.entries[0].since == max(entry.since for entry in page.entries)
    assert {node["Relation Name"] for node in nodes if "Relation Name" in node} == {"engagement_suppression"}
    assert {node["Sort Method"] for node in nodes if "Sort Method" in node} == {"top-N heapsort"}


def _nodes(plan: dict):
    yield plan
    for inner in plan.get("Plans", ()):
        yield from _nodes(inner)


def test_a_settlement_of_one_message_reads_one_row(engine):
    """In a table of a few thousand too, which the planner would read whole for as many rows as it expects of JSON."""
    with Session(engine) as session, session.begin():
        EngagementMessageRepository(session).queue_messages(new_message(f"user{n}") for n in range(4_000))
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text("VACUUM ANALYZE engagement_message_queue"))

    def settle_one(session: Session) -> None:
        sent = Verdict(status=MessageStatus.SENT, event="sent")
        assert claims.settle(session.connection(), [(claim(session)[0], sent)]).recorded

    with Session(engine) as session:
        assert generic_plan(session, settle_one) == [("Index Scan", "pkey")]
