"""`python -m benchmarks [WORK …]`: measure ours beside the floors, and print tables.

PostgreSQL is a temporary one, durable, unless ENGAGEMENT_BENCH_DATABASE_URL names a server; on that, databases are made
and dropped, and nothing else is touched.
"""

import argparse
import logging
import sys
from pathlib import Path

from benchmarks.crowded import claim_from_a_crowd
from benchmarks.delivering import deliver
from benchmarks.draining import drain
from benchmarks.exchanging import send
from benchmarks.idling import idle
from benchmarks.old_snapshot import drain_under_an_old_snapshot
from benchmarks.ordering import drain_in_order
from benchmarks.provider_index import drain_beside_the_index
from benchmarks.queueing import queue_many, queue_one
from benchmarks.server import server
from benchmarks.setup import Setup, Work, machine
from benchmarks.vacuuming import queue_and_drain_under_autovacuum

WORKS: dict[str, Work] = {
    "queue-many": queue_many,
    "queue-one": queue_one,
    "drain": drain,
    "crowd": claim_from_a_crowd,
    "old-snapshot": drain_under_an_old_snapshot,
    "idle": idle,
    "vacuum": queue_and_drain_under_autovacuum,
    "send": send,
    "deliver": deliver,
    "provider-index": drain_beside_the_index,
    "in-order": drain_in_order,
}


def main() -> None:
    """Run the works that are named, or all."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Measure ours beside the floors.")
    parser.add_argument("work", nargs="*", choices=[*WORKS, []], metavar="WORK", help=", ".join(WORKS))
    parser.add_argument("--small", action="store_true", help="only show that it works")
    parser.add_argument("--rounds", type=int, help="how often each contender runs (default: 5; 1 if small)")
    parser.add_argument("--peers", action="store_true", help="measure procrastinate and PgQueuer too")
    parser.add_argument("--picture", type=Path, default=Path("old-snapshot.png"), help="where the PNG goes")
    options = parser.parse_args()
    # Procrastinate warns of each duplicate.
    logging.disable()
    with server() as url:
        setup = Setup(url, options.rounds or (1 if options.small else 5), options.small, options.peers, options.picture)
        _print(machine(setup))
        for name in options.work or WORKS:
            _print(f"## {name}", WORKS[name].__doc__ or "")
            for table in WORKS[name](setup):
                _print(table)


def _print(*paragraphs: str) -> None:
    for paragraph in paragraphs:
        print(paragraph, end="\n\n")
    sys.stdout.flush()


if __name__ == "__main__":
    main()
