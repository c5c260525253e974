"""A day with the four providers: they lose answers, workers are killed, and the truth comes later by webhooks.

The day in CI is short. `ENGAGEMENT_DAY_MESSAGES=10000 pytest -s tests/chaos/test_day.py -k day` plays a long one.
"""

import os
import random
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace

import pytest
from sqlalchemy import create_engine

from engagement import process_message_queue
from engagement._operating.temporary_postgres import temporary_postgres

from .day import BY_OUR_ID, PROVIDERS, Manners, providers
from .evidence import wrong_in_any_run
from .harness import Plan, Run
from .scene import Scene

MESSAGES = int(os.environ.get("ENGAGEMENT_DAY_MESSAGES", "400"))
CI = Plan(
    seed=0,
    messages=MESSAGES,
    workers=3,
    kills_at_each_point=max(1, MESSAGES // 2_000),
    random_kills=max(3, MESSAGES // 500),
    terminations=max(2, MESSAGES // 2_000),
    restarts=1,
    freezes=0,
    is_far_side_moody=False,
    lease_seconds=3,
    longest_seconds=1_200,
)


@contextmanager
def played(plan: Plan, manners: Manners, directory):
    """Play a day to its end: all webhooks have come, and a last run has matched those that had come too soon."""
    with temporary_postgres() as server, Scene(server.url, directory) as scene:
        engine = create_engine(server.url, pool_pre_ping=True)
        with providers(plan.message_types, manners, engine, scene.ledger, plan.seed) as (urls, made, post):
            scene.orders = replace(scene.orders, providers=urls)
            run = Run(plan, scene, server)
            run.play()
            before = Counter(scene.ones("SELECT status FROM engagement_message_queue"))
            post.deliver_all(random.Random(plan.seed))
        engine.dispose()
        process_message_queue(scene.engine, lambda _: pytest.fail("a receipt made something be sent"))
        evidence = scene.evidence(deaths=run.deaths)
    taken = [each for provider in made.values() for each in provider.taken]
    after = Counter((row.message_type, row.status) for row in evidence.messages)
    print(run, f"before the last webhooks: {dict(before)}; after: {dict(after)}; posted: {post.statuses}")  # noqa: T201
    yield run, evidence, taken, post, before


def wrong_ends(evidence, taken) -> Iterator[str]:
    """Yield each message whose state is not what its provider's ledger says."""
    ledger = {each.key: each for each in taken}
    for row in evidence.messages:
        entry = ledger.get(row.idempotency_key)
        found = row.status, row.delivered_at is not None, row.read_at is not None
        if entry is None:
            expected = [("in_doubt", False, False)]
        elif "undeliverable" in entry.events:
            expected = [("failed", False, False)]
        else:
            expected = [("sent", {"delivered", "read"} & set(entry.events) != set(), "read" in entry.events)]
        if entry is not None and entry.provider not in BY_OUR_ID and row.provider_message_id is None:
            expected = [("in_doubt", False, False)]
        if found not in expected:
            yield f"message {row.id} is {found}, and its ledger says {entry}"


@pytest.mark.chaos
def test_a_day_ends_as_the_ledgers_of_the_providers_say(seed, tmp_path):
    """Whatever is lost, killed, late, doubled, shuffled or forged, each message ends as its provider's ledger says.

    What stays in doubt was never taken, or was taken by the one provider that names an id which only its answer tells.
    """
    plan = replace(CI, seed=seed, message_types=PROVIDERS)
    with played(plan, Manners(), tmp_path) as (run, evidence, taken, post, _):
        pass

    assert list(wrong_in_any_run(evidence)) == []
    assert [key for key, sends in evidence.in_ledger.items() if sends > 1] == []
    assert list(wrong_ends(evidence, taken)) == []
    by_our_id = {each.key for each in taken if each.provider in BY_OUR_ID}
    assert [row for row in evidence.messages if row.status == "in_doubt" and row.idempotency_key in by_our_id] == []
    # It was no idle day.
    assert len(evidence.queued) >= MESSAGES
    assert len(run.deaths) >= 10
    assert set(post.statuses) <= {(False, 200), (False, 503), (True, 401), (True, 503)}
    assert post.statuses[True, 401] > 0


@pytest.mark.chaos
def test_doubts_that_were_taken_end_as_sent_without_a_person(seed, tmp_path):
    """Providers that lose all answers, and tell the truth after the last worker has gone, leave no doubt, send once."""
    plan = replace(CI, seed=seed, messages=150, random_kills=2, terminations=0, restarts=0, message_types=BY_OUR_ID)
    manners = Manners(lost_answers=1, held_back=1, undeliverable=0)
    with played(plan, manners, tmp_path) as (run, evidence, taken, _, before):
        pass

    assert set(before) == {"in_doubt"}
    assert list(wrong_in_any_run(evidence)) == []
    assert [key for key, sends in evidence.in_ledger.items() if sends > 1] == []
    assert list(wrong_ends(evidence, taken)) == []
    by_status = Counter(row.status for row in evidence.messages)
    assert by_status["sent"] == len(taken) > 0
    assert len(run.deaths) >= 9
