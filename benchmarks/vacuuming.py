"""Work 7: queue and drain for minutes beside a million finished messages, under several autovacuum settings.

A message is inserted and then updated twice, and both updates change indexed columns: two dead rows, no HOT update.
Sizes, dead rows and pages count here; times say more of the machine.
"""

import json
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from benchmarks.crowded import finished
from benchmarks.floors import Floor
from benchmarks.given import given
from benchmarks.measuring import aligned, number
from benchmarks.ours import Ours
from benchmarks.server import Database, database
from benchmarks.setup import Setup

PERIOD_SECONDS = 2.0
"""The time between two bursts, on any machine, so that every setting has the same work."""

SETTINGS = {
    "PostgreSQL's defaults": "",
    "vacuum at 5 %": "autovacuum_vacuum_scale_factor = 0.05",
    "vacuum at 2 %": "autovacuum_vacuum_scale_factor = 0.02",
    "vacuum at 1 %": "autovacuum_vacuum_scale_factor = 0.01",
    "vacuum and analyze at 2 %": "autovacuum_vacuum_scale_factor = 0.02, autovacuum_analyze_scale_factor = 0.02",
    "vacuum at 2 %, unthrottled": "autovacuum_vacuum_scale_factor = 0.02, autovacuum_vacuum_cost_delay = 0",
    "vacuum at 2 %, fillfactor 80": "autovacuum_vacuum_scale_factor = 0.02, fillfactor = 80",
    "vacuum at 5,000 dead": "autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000",
    "vacuum at 5,000 dead, and its indexes": (
        "autovacuum_vacuum_scale_factor = 0, autovacuum_vacuum_threshold = 5000, vacuum_index_cleanup = on"
    ),
}

_STATISTICS = """
    SELECT n_dead_tup, autovacuum_count, autoanalyze_count, n_tup_upd, n_tup_hot_upd
    FROM pg_stat_user_tables
    WHERE relname = 'engagement_message_queue'
"""
_VACUUMS = "SELECT count(*) FROM pg_stat_progress_vacuum WHERE datname = current_database()"
_SIZES = """
    SELECT pg_table_size('engagement_message_queue'), pg_indexes_size('engagement_message_queue')
"""
_SIZE_OF_DUE = "SELECT pg_relation_size('engagement_message_queue_due')"
_FIRST_DUE = """
    SELECT id FROM engagement_message_queue
    WHERE status = 'pending' AND next_attempt_at <= statement_timestamp()
    ORDER BY next_attempt_at, id LIMIT 100
"""
_COUNTS = "SELECT status, count(*) FROM engagement_message_queue GROUP BY status"


@dataclass
class Played:
    """The observations while bursts were queued and drained, and at the end."""

    drained: list[float] = field(default_factory=list)
    dead: list[int] = field(default_factory=list)
    pages: list[int] = field(default_factory=list)
    """Buffers that were touched to find the first hundred that are due."""
    vacuuming: list[bool] = field(default_factory=list)
    vacuums: int = 0
    analyzes: int = 0
    hot: float = 0.0
    sizes: tuple[int, int] = (0, 0)
    """Of the table and of its indexes."""
    least: tuple[int, int] = (0, 0)
    """Their sizes after VACUUM FULL."""
    due: int = 0
    """The size of the index of due messages."""
    counting: int = 0
    """Buffers that `count_by_status` touched at the end."""

    def line(self, name: str) -> tuple[str, ...]:
        """Return its cells."""
        quarter = max(1, len(self.drained) // 4)
        return (
            name,
            f"{self.vacuums} / {self.analyzes}",
            f"{sum(self.vacuuming) / len(self.vacuuming):.0%}",
            number(max(self.dead)),
            number(self.dead[-1]),
            *map(_size, self.sizes, self.least),
            f"{self.due / 2**20:.1f}",
            f"{number(median(self.pages))} / {number(max(self.pages))}",
            number(self.counting),
            f"{self.hot:.1%}",
            f"{median(self.drained[-quarter:]) / median(self.drained[:quarter]):.2f}",
        )


def _size(size: int, least: int) -> str:
    return f"{size / 2**20:,.1f} (+{size / least - 1:.0%})"


HEADER = (
    "setting",
    "vacuums / analyzes",
    "time in vacuum",
    "dead rows, most",
    "at the end",
    "table MB",
    "indexes MB",
    "index of what is due MB",
    "pages for 100 due, median / most",
    "pages for the counts",
    "HOT",
    "drain, last quarter by first",
)


def queue_and_drain_under_autovacuum(setup: Setup) -> Iterator[str]:
    """Queue and drain 500 a second for five minutes beside a million finished messages, under autovacuum settings.

    The sizes of the table and its indexes are shown beside their growth over the sizes after VACUUM FULL.
    """
    played = []
    for name, settings in SETTINGS.items():
        with database(setup.url) as db:
            played.append(_play(setup, db, settings).line(name))
    yield aligned([HEADER, *played])


def _play(setup: Setup, db: Database, settings: str) -> Played:
    _set(db, settings)
    db.execute(finished(setup.size(1_000_000, 1_000)), "VACUUM ANALYZE engagement_message_queue", "CHECKPOINT")
    played, queue, draining = Played(), Floor(db), Ours(db, many=True, concurrency=100)
    size, period = setup.size(1_000, 100), setup.seconds(PERIOD_SECONDS, 0.05)
    started = time.monotonic()
    with db.connect(autocommit=True) as connection:
        for turn in range(setup.size(150, 4)):
            time.sleep(max(0.0, started + turn * period - time.monotonic()))
            queue.queue_many(given(size))()
            played.pages.append(_pages(connection, _FIRST_DUE))
            begun = time.monotonic()
            draining.drain()()
            played.drained.append(size / (time.monotonic() - begun))
            dead, played.vacuums, played.analyzes, updated, hot = _row(connection, _STATISTICS)
            played.hot = hot / updated if updated else 0.0
            played.dead.append(dead)
            played.vacuuming.append(bool(_row(connection, _VACUUMS)[0]))
        played.sizes = _row(connection, _SIZES)
        (played.due,) = _row(connection, _SIZE_OF_DUE)
        played.counting = _pages(connection, _COUNTS)
        connection.execute("VACUUM FULL engagement_message_queue")
        played.least = _row(connection, _SIZES)
    return played


def _set(db: Database, settings: str) -> None:
    """Put `settings` in the place of all that the migrations have set."""
    with db.connect(autocommit=True) as connection:
        (ours,) = _row(connection, "SELECT reloptions FROM pg_class WHERE relname = 'engagement_message_queue'")
        names = ", ".join(option.partition("=")[0] for option in ours or ())
        if names:
            connection.execute(f"ALTER TABLE engagement_message_queue RESET ({names})")
        if settings:
            connection.execute(f"ALTER TABLE engagement_message_queue SET ({settings})")


def _pages(connection: Any, query: str) -> int:
    (plan,) = _row(connection, f"EXPLAIN (ANALYZE, BUFFERS, TIMING OFF, FORMAT JSON) {query}")
    top = (json.loads(plan) if isinstance(plan, str) else plan)[0]["Plan"]
    return int(top["Shared Hit Blocks"] + top["Shared Read Blocks"])


def _row(connection: Any, query: str) -> Any:
    return connection.execute(query).fetchone()
