"""The chaos runs, for as long as you like: `python -m tests.chaos.soak --minutes 30 --seed 1`.

Stops at the first thing that is wrong, and names the seed that replays it.
"""
# ruff: noqa: T201  # a command that prints

import argparse
import random
import secrets
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import cycle
from pathlib import Path

from engagement._operating.temporary_postgres import temporary_postgres

from .evidence import Evidence, wrong_if_all_are_sent, wrong_if_sent_at_most_once, wrong_in_any_run
from .harness import Plan, Run
from .scene import Scene

PLAIN = Plan(seed=0, messages=5_000, kills_at_each_point=8, random_kills=40, terminations=20, restarts=3, freezes=3)
IDEMPOTENT = replace(PLAIN, idempotent=True, max_retries=100, is_far_side_moody=False)
LOOKS_UP = replace(PLAIN, looks_up=True, max_retries=100, is_far_side_moody=False, freezes=0)


def wrong(plan: Plan, evidence: Evidence) -> Iterator[str]:
    yield from wrong_in_any_run(evidence)
    if plan.idempotent or plan.looks_up:
        yield from wrong_if_all_are_sent(evidence, is_deduplicated=plan.idempotent)
    else:
        yield from wrong_if_sent_at_most_once(evidence)


def play(plan: Plan) -> bool:
    """Play one run, print what came of it, and return whether nothing was wrong."""
    with (
        tempfile.TemporaryDirectory() as directory,
        temporary_postgres() as server,
        Scene(server.url, Path(directory)) as scene,
    ):
        run = Run(plan, scene, server)
        found = list(wrong(plan, run.play()))
    print(f"{'WRONG' if found else 'right'} {run}")
    for each in found:
        print(f"  {each}")
    return not found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=30, help="no run is begun after that (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=None, help="of the first run (default: drawn and printed)")
    given = parser.parse_args()
    seed = secrets.randbits(32) if given.seed is None else given.seed
    end = time.monotonic() + given.minutes * 60
    for plan in cycle([PLAIN, IDEMPOTENT, LOOKS_UP]):
        print(f"seed {seed}", flush=True)
        if not play(replace(plan, seed=seed, longest_seconds=1_200)):
            return 1
        if time.monotonic() > end:
            return 0
        seed = random.Random(seed).getrandbits(32)
    return 0


if __name__ == "__main__":
    sys.exit(main())
