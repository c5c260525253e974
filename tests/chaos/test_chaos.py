"""The proof: whatever is killed, frozen or cut off, nothing is sent twice and nothing is lost."""

import pytest

from engagement._operating.temporary_postgres import temporary_postgres

from .evidence import wrong_if_all_are_sent, wrong_if_in_order, wrong_if_sent_at_most_once, wrong_in_any_run
from .harness import Plan, Run
from .orders import Point
from .scene import Scene


def play(plan: Plan, directory):
    with temporary_postgres() as server, Scene(server.url, directory) as scene:
        run = Run(plan, scene, server)
        evidence = run.play()
    print(run)  # noqa: T201 - pytest shows it if the test fails
    return run, evidence


@pytest.mark.chaos
def test_nothing_is_sent_twice_or_lost(seed, tmp_path):
    """Whatever is killed, frozen or cut off, nothing is sent twice or lost; in doubt is what the dead had in hand."""
    run, evidence = play(Plan(seed=seed), tmp_path)

    assert list(wrong_in_any_run(evidence)) == []
    assert list(wrong_if_sent_at_most_once(evidence)) == []
    assert len(evidence.queued) >= 2_000
    assert len(evidence.deaths) >= 40
    assert all(run.blows[point] >= 4 for point in (*Point, "random"))
    assert (run.blows["termination"], run.blows["restart"], run.blows["freeze"]) == (5, 1, 1)


@pytest.mark.chaos
def test_an_idempotent_transport_ends_with_everything_sent(seed, tmp_path):
    """If the far side ignores a repeated delivery id, the same blows leave nothing in doubt: all is sent, once."""
    plan = Plan(
        seed=seed,
        messages=600,
        kills_at_each_point=1,
        random_kills=5,
        terminations=3,
        idempotent=True,
        max_retries=50,
        is_far_side_moody=False,
        lease_seconds=4,
    )
    _, evidence = play(plan, tmp_path)

    assert list(wrong_in_any_run(evidence)) == []
    assert list(wrong_if_all_are_sent(evidence, is_deduplicated=True)) == []


@pytest.mark.chaos
def test_a_look_up_leaves_no_doubt(seed, tmp_path):
    """If the far side can be asked what became of a message, the same blows end with everything sent once."""
    plan = Plan(
        seed=seed,
        messages=300,
        kills_at_each_point=1,
        random_kills=4,
        terminations=2,
        freezes=0,
        looks_up=True,
        max_retries=50,
        is_far_side_moody=False,
        lease_seconds=4,
    )
    _, evidence = play(plan, tmp_path)

    assert list(wrong_in_any_run(evidence)) == []
    assert list(wrong_if_all_are_sent(evidence, is_deduplicated=False)) == []


@pytest.mark.chaos
def test_each_person_is_sent_one_at_a_time_in_order(seed, tmp_path):
    """Whatever is killed or cut off, no worker claims for a person beside a living one, nor a younger message first."""
    plan = Plan(
        seed=seed,
        messages=400,
        people=25,
        kills_at_each_point=1,
        random_kills=4,
        terminations=2,
        freezes=0,
        looks_up=True,
        max_retries=50,
        is_far_side_moody=False,
        lease_seconds=4,
    )
    _, evidence = play(plan, tmp_path)

    assert list(wrong_in_any_run(evidence)) == []
    assert list(wrong_if_in_order(evidence)) == []
    assert list(wrong_if_all_are_sent(evidence, is_deduplicated=False)) == []
