"""Prometheus: what a scrape says of the queue and costs it, and that dashboard and alerts ask for what exists."""

import json
import logging
import re
import tempfile
import time
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from conftest import execute, new_message, queue
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.parser import text_string_to_metric_families
from sqlalchemy import create_engine, event, select, text
from sqlalchemy.orm import Session

from engagement import (
    EngagementMessageRepository,
    InDoubt,
    NotSent,
    Receipt,
    Refused,
    Sent,
    migrations,
    process_message_queue,
)
from engagement._sql.schemas import with_schema
from engagement._sql.working import STANDINGS
from engagement._watching import metrics
from engagement._watching.metrics import COUNTERS, HISTOGRAMS, QUEUE, QueueReader
from engagement.messages import delivery_id, reference
from engagement.models import PAUSE_TABLE_NAME, TABLE_NAME, WORKER_TABLE_NAME, EngagementMessage
from engagement.prometheus import EngagementCollector

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
NOWHERE = "postgresql+psycopg://nobody@127.0.0.1:1/nothing"
GOODBYE = (("message_type", "goodbye"),)


@contextmanager
def scraping(engine=None, **options):
    """Return a function that scrapes: {(name, labels): value}, from the text that Prometheus reads."""
    registry = CollectorRegistry(auto_describe=True)
    collector = EngagementCollector(engine, **options)
    registry.register(collector)
    try:
        yield lambda: _samples(generate_latest(registry).decode())
    finally:
        collector.close()


def _samples(exposition: str) -> dict:
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(exposition)
        for sample in family.samples
    }


def put(engine, user_id: str, changes: str, **fields) -> None:
    """Queue a message, and put it in a state by hand."""
    (message_id,) = queue(engine, new_message(user_id, **fields))
    execute(engine, f"UPDATE {TABLE_NAME} SET {changes} WHERE id = :id", id=message_id)


# How the queue stands


def test_a_scrape_says_how_the_queue_stands(engine):
    """What waits, is claimed, lost, in doubt and failed is counted, each on its side of the boundary, and by type."""
    put(engine, "due1", "next_attempt_at = now() - interval '1 hour'")
    put(engine, "due2", "next_attempt_at = now() - interval '1 minute'")
    put(engine, "later", "next_attempt_at = now() + interval '1 minute'")
    for number in range(2):
        put(engine, f"held{number}", "status = 'sending', attempt = 1, lease_expires_at = now() + interval '1 minute'")
    put(engine, "lost", "status = 'sending', attempt = 1, lease_expires_at = now() - interval '1 minute'")
    put(engine, "sent", "status = 'sent', attempt = 1, sent_at = now()")
    put(engine, "cancelled", "status = 'cancelled'")
    put(engine, "expired", "status = 'expired'")
    for number in range(2):
        put(engine, f"doubt{number}", "status = 'in_doubt', attempt = 1")
    put(engine, "doubt", "status = 'in_doubt', attempt = 1", message_type="weekly_review")
    put(engine, "failed", "status = 'failed', attempt = 1, next_attempt_at = now() - interval '7 days' * 0.99")
    put(engine, "failed long ago", "status = 'failed', attempt = 1, next_attempt_at = now() - interval '7 days'")

    with scraping(engine) as scrape:
        found = scrape()

    review = (("message_type", "weekly_review"),)
    age = found.pop(("engagement_oldest_due_age_seconds", ()))
    assert 3_600 <= age < 3_660
    assert [found.pop(("engagement_workers", (("standing", each),))) for each in STANDINGS] == [0.0] * len(STANDINGS)
    assert {key: value for key, value in found.items() if key[0] in GAUGES} == {
        ("engagement_up", ()): 1,
        ("engagement_paused", ()): 0,
        ("engagement_due", ()): 2,
        ("engagement_scheduled", ()): 1,
        ("engagement_sending", ()): 3,
        ("engagement_expired_leases", ()): 1,
        ("engagement_in_doubt", GOODBYE): 2,
        ("engagement_in_doubt", review): 1,
        ("engagement_failed", GOODBYE): 1,
    }


GAUGES = {metric.prometheus_name for metric in QUEUE}


def test_an_empty_queue_is_all_zeros(engine):
    """Nothing to do is a zero, not a gap in a graph."""
    with scraping(engine) as scrape:
        found = scrape()

    assert {name: value for (name, _), value in found.items() if name in GAUGES} == {
        "engagement_up": 1,
        "engagement_oldest_due_age_seconds": 0,
        "engagement_paused": 0,
        "engagement_due": 0,
        "engagement_scheduled": 0,
        "engagement_sending": 0,
        "engagement_expired_leases": 0,
        "engagement_workers": 0,
    }


def test_the_table_may_be_in_a_schema(empty_engine):
    """`schema` is where the table is, also if its name must be quoted."""
    migrations.upgrade(empty_engine, schema='the "crm" %s')
    with Session(empty_engine) as session, session.begin():
        EngagementMessageRepository(session, schema='the "crm" %s').queue_message(new_message())

    with scraping(empty_engine, schema='the "crm" %s') as scrape:
        found = scrape()

    assert (found["engagement_up", ()], found["engagement_due", ()]) == (1, 1)


# What it costs


def test_a_driver_that_prepares_everything_reads_the_queue_too(engine):
    """And prepares as before what comes after it on that connection."""
    preparing = create_engine(engine.url, connect_args={"prepare_threshold": 0})
    for _ in range(2):
        assert QueueReader(preparing).read()[0][2] == 1
    with preparing.connect() as connection:
        assert connection.connection.driver_connection.prepare_threshold == 0
    preparing.dispose()


def test_a_scrape_is_one_round_trip(engine):
    """The database is asked once and answers once, also when a connection has been used often."""
    other = create_engine(engine.url, pool_size=1, max_overflow=0)
    with scraping(other) as scrape, tempfile.TemporaryFile() as traced:
        for _ in range(12):  # psycopg prepares what it has seen five times.
            scrape()
        with other.connect() as connection:
            protocol = connection.connection.driver_connection.pgconn
        protocol.trace(traced.fileno())
        scrape()
        protocol.untrace()
        traced.seek(0)
        messages = re.findall(r"^\d{4}-[^\t]*\t([FB])\t\d+\t(\w+)", traced.read().decode(), re.MULTILINE)
    other.dispose()

    assert [name for side, name in messages if side == "F"] == ["Query"]
    assert [name for side, name in messages if side == "B"].count("ReadyForQuery") == 1


def plan_of_a_scrape(engine) -> str:
    settings, statement = QueueReader(engine).sql.split("; ")
    with engine.begin() as connection:
        connection.exec_driver_sql(settings)
        return "\n".join(
            connection.exec_driver_sql(f"EXPLAIN {with_schema(statement, 'public', connection)}").scalars()
        )


def run_alone(engine, sql) -> None:
    with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
        connection.execute(text(sql))


def test_a_scrape_reads_indexes_only(engine):
    """What is counted comes from partial indexes, in their order, also while statistics know of no backlog yet."""
    run_alone(engine, f"VACUUM ANALYZE {TABLE_NAME}")
    execute(
        engine,
        f"""INSERT INTO {TABLE_NAME}
            (user_id, message_type, message_key, destination, destination_jid, status, sent_at, idempotency_key)
        SELECT 'u' || n, 'goodbye', 'k', 'individual', '5511999999999@s.whatsapp.net',
            CASE n % 3 WHEN 0 THEN 'pending' WHEN 1 THEN 'failed' ELSE 'sent' END,
            CASE n % 3 WHEN 2 THEN now() END, 'u' || n
        FROM generate_series(1, 20000) AS n""",
    )
    before = plan_of_a_scrape(engine)
    run_alone(engine, f"VACUUM ANALYZE {TABLE_NAME}")
    after = plan_of_a_scrape(engine)

    # The workers and the pauses are few.
    few = rf"Seq Scan on \w*\.?({WORKER_TABLE_NAME}|{PAUSE_TABLE_NAME})"
    for plan in (re.sub(few, "", each) for each in (before, after)):
        assert set(re.findall(r"\w+ Scan|Sort", plan)) <= {"Only Scan", "Index Scan"}
        indexes = set(re.findall(rf"using ({TABLE_NAME}_\w+)", plan))
        assert indexes == {f"{TABLE_NAME}_{name}" for name in ("due", "lease", "attention")}


def test_counting_ends_somewhere(engine, monkeypatch):
    """A count stops where its metric's text says, so that a scrape costs the same in the worst backlog."""
    for number in range(4):
        put(engine, f"due{number}", "next_attempt_at = now() - interval '1 hour'")
        put(engine, f"failed{number}", "status = 'failed', attempt = 1")
    monkeypatch.setattr(metrics, "COUNTED_UP_TO", 3)
    monkeypatch.setattr(metrics, "COUNTED_BY_TYPE_UP_TO", 2)

    with scraping(engine) as scrape:
        found = scrape()

    assert (found["engagement_due", ()], found["engagement_failed", GOODBYE]) == (3, 2)


def test_what_is_said_of_counting_is_so():
    """The limits in the texts are those in the code."""
    for metric in set(QUEUE) - {metrics.UP, metrics.OLDEST_DUE_AGE, metrics.PAUSED, metrics.WORKERS}:
        limit = metrics.COUNTED_BY_TYPE_UP_TO if metric.labels else metrics.COUNTED_UP_TO
        assert f"to {limit:,})" in metric.help
    assert f"within {metrics.FAILED_DAYS} days" in metrics.FAILURES.help


def settings_of(connection) -> tuple:
    return tuple(
        connection.execute(text("SELECT current_setting('statement_timeout'), current_setting('enable_sort')")).one()
    )


def test_a_scrape_does_not_wait_for_a_locked_table(engine):
    """After `timeout` the scrape says that the queue could not be read, and the next one reads it again."""
    other = create_engine(engine.url, connect_args={"options": "-c lock_timeout=20s"})
    with scraping(other, timeout=timedelta(milliseconds=100)) as scrape, engine.connect() as holder:
        holder.execute(text(f"LOCK TABLE {TABLE_NAME} IN ACCESS EXCLUSIVE MODE"))
        started_at = time.monotonic()
        locked = scrape()
        took = time.monotonic() - started_at
        holder.rollback()
        free = scrape()
    other.dispose()

    assert (locked["engagement_up", ()], free["engagement_up", ()]) == (0, 1)
    assert 0.1 <= took < 15


def test_a_scrape_leaves_no_setting_behind(engine):
    """The host's connection goes back to its pool as it came."""
    other = create_engine(engine.url, pool_size=1, max_overflow=0)
    with other.connect() as connection:
        before = settings_of(connection)
    with scraping(other) as scrape:
        assert scrape()["engagement_up", ()] == 1
    with other.connect() as connection:
        after = settings_of(connection)
    other.dispose()

    assert after == before


# When the database is away


def test_a_lost_database_is_a_sample(caplog):
    """A database that is away is `engagement_up 0` and a line in the log; what the process counted is still told."""
    with scraping(create_engine(NOWHERE)) as scrape:
        found = scrape()

    assert {name for name, _ in found if name in GAUGES} == {"engagement_up"}
    assert found["engagement_up", ()] == 0
    assert found["engagement_queued_total", ()] == 0
    assert [record.getMessage() for record in caplog.records] == ["engagement.queue_not_read error=OperationalError"]


def test_a_table_that_is_not_there_is_a_sample(empty_engine, caplog):
    """A database that was not migrated cannot be read; the log names the SQLSTATE."""
    with scraping(empty_engine) as scrape:
        found = scrape()
        migrations.upgrade(empty_engine)
        migrated = scrape()

    assert (found["engagement_up", ()], migrated["engagement_up", ()]) == (0, 1)
    assert "engagement.queue_not_read error=ProgrammingError 42P01" in caplog.text


def test_a_killed_connection_is_replaced(engine, caplog):
    """A scrape whose connection was ended says so, and the next one is well."""
    other = create_engine(engine.url, connect_args={"application_name": "scraped"})
    with scraping(other) as scrape:
        scrape()
        execute(
            engine,
            """SELECT pg_terminate_backend(pid) FROM pg_stat_activity
            WHERE application_name = 'scraped' AND datname = current_database()""",
        )
        answers = [scrape()["engagement_up", ()] for _ in range(2)]
    other.dispose()

    assert answers == [0, 1]
    assert "engagement.queue_not_read error=OperationalError" in caplog.text


def test_registering_asks_the_database_nothing():
    """A host can register the collector where its database is not there yet, and not twice."""
    engine = create_engine(NOWHERE)
    event.listen(engine, "do_connect", lambda *_: pytest.fail("was connected"))
    registry = CollectorRegistry(auto_describe=True)
    collectors = [EngagementCollector(engine), EngagementCollector(engine)]
    try:
        registry.register(collectors[0])
        with pytest.raises(ValueError, match="engagement_queued"):
            registry.register(collectors[1])
    finally:
        for collector in collectors:
            collector.close()


@pytest.mark.parametrize(
    ("options", "field"),
    [
        ({"engine": object()}, "engine"),
        ({"engine": create_engine(NOWHERE), "timeout": timedelta(0)}, "timeout"),
    ],
)
def test_options_are_checked(options, field):
    """A bad option is named at once, not at the first scrape."""
    with pytest.raises(ValueError, match=field):
        EngagementCollector(**options)


# What this process does


def test_what_a_process_does_is_counted(engine):
    """Queued, duplicates, outcomes by type with where the message then stands, and the time from due to sent."""
    with scraping() as scrape:
        queue(engine, new_message("a"), new_message("a"), new_message("b", message_type="review"))
        with Session(engine) as session, session.begin():
            more = [new_message("c"), new_message("d"), new_message("a")]
            EngagementMessageRepository(session).queue_messages(more)
        execute(
            engine,
            f"""UPDATE {TABLE_NAME} SET next_attempt_at = now() - interval '1 hour',
            scheduled_for = now() - interval '1 day' WHERE user_id = 'a'""",
        )
        answers = {"a": Sent(), "b": Refused("x"), "c": NotSent("x"), "d": InDoubt("x")}
        process_message_queue(engine, lambda message: answers[message.user_id], backoff=lambda _: timedelta(hours=1))
        found = scrape()

    assert (found["engagement_queued_total", ()], found["engagement_duplicates_total", ()]) == (4, 2)
    outcomes = {
        tuple(value for _, value in labels): count
        for (name, labels), count in found.items()
        if name == "engagement_outcomes_total"
    }
    assert outcomes == {
        ("goodbye", "sent", "sent"): 1,
        ("review", "refused", "failed"): 1,
        ("goodbye", "not_sent", "pending"): 1,
        ("goodbye", "in_doubt", "in_doubt"): 1,
    }
    assert found["engagement_due_to_sent_seconds_count", GOODBYE] == 1
    assert 3_600 <= found["engagement_due_to_sent_seconds_sum", GOODBYE] < 3_660
    bucket = "engagement_due_to_sent_seconds_bucket"
    buckets = {le: found[bucket, (("le", le), *GOODBYE)] for le in ("3600.0", "14400.0")}
    assert buckets == {"3600.0": 0, "14400.0": 1}
    assert not {name for name, _ in found} & GAUGES


def test_a_lost_claim_is_counted_as_that(engine):
    """An outcome that could not be recorded is told apart from one that was."""
    queue(engine, new_message())

    def send(_message):
        execute(engine, f"UPDATE {TABLE_NAME} SET attempt = attempt + 1")
        return Refused("no such number")

    with scraping() as scrape:
        process_message_queue(engine, send)
        found = scrape()

    labels = (("message_type", "goodbye"), ("outcome", "refused"), ("status", "claim_lost"))
    assert found["engagement_outcomes_total", labels] == 1
    assert ("engagement_due_to_sent_seconds_count", GOODBYE) not in found


def test_a_closed_collector_counts_nothing(engine):
    """After `close`, what the process does is not counted any more."""
    with scraping() as scrape:
        queue(engine, new_message("a"))
    queue(engine, new_message("b"))

    assert scrape()["engagement_queued_total", ()] == 1


def test_nothing_personal_is_exposed(engine, caplog):
    """No user, number, key, param or reason is in what a scrape returns or logs."""
    caplog.set_level(logging.DEBUG, logger="engagement")
    registry = CollectorRegistry()
    collector = EngagementCollector(engine)
    registry.register(collector)
    queue(engine, new_message("person-1", message_key="words-1"), new_message("person-2"), new_message("person-2"))
    process_message_queue(engine, lambda message: Refused(f"reason {message.destination_jid}"))
    exposition = generate_latest(registry).decode()
    collector.close()

    assert 'engagement_failed{message_type="goodbye"} 2.0' in exposition
    for private in ("person-", "words-", "whatsapp", "reason", "goodbye:"):
        assert private not in exposition + caplog.text


# The dashboard, the alerts and their page


def exposed() -> set[str]:
    """Return the names of all series that a collector can expose."""
    histograms = {f"{metric.prometheus_name}_{part}" for metric in HISTOGRAMS for part in ("bucket", "sum", "count")}
    return {f"{metric.prometheus_name}_total" for metric in COUNTERS} | histograms | GAUGES


def expressions(panels) -> list[str]:
    found = [target["expr"] for panel in panels for target in panel.get("targets", [])]
    return found + [expression for panel in panels for expression in expressions(panel.get("panels", []))]


def test_the_names_are_those_of_the_collector(engine):
    """What this file calls exposed is what a scrape returns once everything has happened."""
    with scraping(engine) as scrape:
        queue(engine, *(new_message(user_id) for user_id in "aabcd"))
        answers = {"a": Sent(), "b": Refused("x"), "c": InDoubt("x"), "d": InDoubt("x")}
        process_message_queue(engine, lambda message: answers[message.user_id])
        told = ("a", "delivered"), ("a", "read"), ("d", "undeliverable")
        with Session(engine) as session, session.begin():
            rows = {each.user_id: each for each in session.scalars(select(EngagementMessage))}
            EngagementMessageRepository(session).record_receipts(
                Receipt(
                    event=event,
                    at=datetime.now(UTC),
                    provider="cloud",
                    reference=reference(rows[user_id].id, delivery_id(rows[user_id].idempotency_key)),
                )
                for user_id, event in told
            )
        names = {name for name, _ in scrape() if not name.endswith("_created")}

    assert names == exposed()


def test_the_dashboard_and_the_alerts_ask_for_what_exists():
    """Each metric that they name is one of the collector's; the dashboard shows all, and each alert says what to do."""
    dashboard = json.loads((DOCS / "grafana-dashboard.json").read_text())
    alerts = (DOCS / "alerts.yml").read_text()
    shown = {name for expr in expressions(dashboard["panels"]) for name in re.findall(r"engagement_\w+", expr)}
    alerted = set(re.findall(r"\bengagement_\w+", alerts))

    assert len(shown) >= 10
    assert shown <= exposed()
    assert alerted
    assert alerted <= exposed()
    base = {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in exposed()}
    assert {re.sub(r"_(total|bucket|sum|count)$", "", name) for name in shown} == base
    rules = alerts.split("- alert: ")[1:]
    assert len(rules) >= 6
    for rule in rules:
        keys = re.findall(r"^ {8,10}(\w+):", rule, re.MULTILINE)
        assert keys == ["expr", "for", "labels", "annotations", "summary", "description"]
        assert re.search(r"labels: \{severity: (page|ticket)\}$", rule, re.MULTILINE)


def test_each_panel_says_what_it_shows():
    """A panel has a title, a description and a place of its own."""
    panels = json.loads((DOCS / "grafana-dashboard.json").read_text())["panels"]
    cells = [
        (x, y)
        for panel in panels
        for x in range(panel["gridPos"]["x"], panel["gridPos"]["x"] + panel["gridPos"]["w"])
        for y in range(panel["gridPos"]["y"], panel["gridPos"]["y"] + panel["gridPos"]["h"])
    ]

    assert all(panel["title"] and panel["description"] for panel in panels if panel["type"] != "row")
    assert len(cells) == len(set(cells))
    assert len({panel["id"] for panel in panels}) == len(panels)


def test_each_metric_is_explained_in_one_line():
    """docs/watching.md says of each metric what the metric says of itself."""
    page = (DOCS / "watching.md").read_text()

    for metric in (*COUNTERS, *HISTOGRAMS, *QUEUE):
        suffix = "_total" if metric in COUNTERS else ""
        labels = ", ".join(f"`{label}`" for label in metric.labels)
        assert f"| `{metric.prometheus_name}{suffix}` | {labels} | {metric.help} |" in page


def test_the_pages_python_runs(engine, monkeypatch):
    """Each block of Python in docs/watching.md runs as it stands."""
    served = []
    monkeypatch.setattr("prometheus_client.start_http_server", served.append)
    monkeypatch.setattr("prometheus_client.REGISTRY", CollectorRegistry(auto_describe=True))
    blocks = re.findall(r"^```python\n(.*?)^```", (DOCS / "watching.md").read_text(), re.DOTALL | re.MULTILINE)
    namespace = {"url": engine.url, "engine": engine}
    try:
        for block in blocks:
            exec(compile(block, "docs/watching.md", "exec"), namespace)
    finally:
        namespace["EngagementInstrumentor"]().uninstrument()
        namespace["collector"].close()

    assert len(blocks) == 2
    assert served == [9464]
