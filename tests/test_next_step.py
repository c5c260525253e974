"""Single decisions of the schedule that a generated history seldom meets."""

from datetime import timedelta

import pytest
from conftest import outgoing

from engagement._claim import Claim
from engagement._delivery.options import Options
from engagement._delivery.schedule import next_step
from engagement._delivery.state import State
from engagement._delivery.steps import Beat, Collect, GiveUp, Nap, Over, Peek, Taken, Transact
from engagement._delivery.verdicts import Verdicts
from engagement.outcomes import InDoubt, Sent

OPTIONS = Options(
    concurrency=2,
    lease=timedelta(seconds=100),
    send_timeout=timedelta(seconds=10),
    poll_interval=timedelta(seconds=60),
    worker_name="w",
)


class Handle:
    """A call that goes on."""

    def cancel(self) -> bool:
        """Be too late."""
        return False


def claim(number: int, now: float) -> Claim:
    message = outgoing(id=number)
    return Claim(message, (message.scheduled_for, number), "w/1", now + 100, started_at=now, handle=Handle())


AN_HOUR = 3600.0


def peeked(state, now: float, waits: float) -> None:
    """Do the next step, a question to the database; something is due in so many seconds."""
    step = next_step(state, now)
    assert isinstance(step, Peek)
    state.peeked(step, waits, took=0.0, now=now)


@pytest.fixture(name="state")
def _state():
    return State(OPTIONS, 0.0, sends_many=False, can_be_asked=False, until_empty=False, limit=None)


def committed(state, now: float, *claims: Claim, recovered_all: bool = False) -> None:
    """Do the next step, a transaction that claims these."""
    step = next_step(state, now)
    assert isinstance(step, Transact)
    state.committed(step, Taken("w/1", claims=list(claims), recovered_all=recovered_all), now)


def test_recovery_comes_back_after_a_quarter_of_the_lease(state):
    """Also under a load that never lets the worker idle; and not with every claim, since it is a statement more."""
    committed(state, 0.0, claim(1, 0.0), recovered_all=True)

    assert not next_step(state, 24.9 - 15).takes_over
    state.answered(state.hand.claims[1], Sent(), Verdicts(OPTIONS, idempotent=False).of(state.hand.claims[1], Sent()))
    assert not next_step(state, 24.9).takes_over
    assert next_step(state, 25.0).takes_over


def test_a_second_error_ends_the_run_with_messages_in_hand(state):
    """The first one lets them be finished; but if the database refuses that too, nobody can settle them."""
    committed(state, 0.0, claim(1, 0.0))
    first, second = RuntimeError("first"), RuntimeError("second")

    state.undone(first, 1.0, will_mend=False)
    assert not isinstance(next_step(state, 1.0), Over)
    state.undone(second, 2.0, will_mend=False)

    assert next_step(state, 2.0) == Over(second)


def test_the_destination_of_a_call_that_was_given_up_is_looked_at_when_it_ends(state):
    """At once, and not with the next poll: messages to it were skipped meanwhile."""
    verdicts, late, outcome = Verdicts(OPTIONS, idempotent=False), claim(1, 0.0), InDoubt("no answer")
    committed(state, 0.0, late)
    assert next_step(state, 10.0) == GiveUp([late])
    state.given_up(late, outcome, verdicts.of(late, outcome), goes_on=True)
    committed(state, 10.0)
    peeked(state, 10.0, AN_HOUR)
    assert isinstance(next_step(state, 11.0), Collect)

    state.answered(late, outcome, verdicts.of(late, outcome))

    assert isinstance(next_step(state, 11.0), Peek)


def test_a_message_that_becomes_due_is_waited_for_by_a_timer(state):
    """One question says how long the worker may sleep, and no poll comes before that moment."""
    committed(state, 0.0)
    peeked(state, 0.0, 7.25)
    assert next_step(state, 0.0) == Nap(7.25)

    peeked(state, 7.25, 0.0)

    assert next_step(state, 7.25).wanted == 2


def test_claims_in_vain_become_rarer(state):
    """A due message that another session has locked is tried again soon, then ever later, and at each poll at last."""
    now, waits = 0.0, []
    for _ in range(16):
        committed(state, now)
        peeked(state, now, 0.0)
        # It sleeps, but for a heartbeat of its own now and then.
        assert isinstance(next_step(state, now), Nap | Beat)
        waits.append(round(state.look_at - now, 6))
        now = state.look_at

    assert waits[:4] == [0.01, 0.02, 0.04, 0.08]
    assert waits[-2:] == [60.0, 60.0]


def test_a_place_that_becomes_free_ends_the_wait_after_claims_in_vain(state):
    """The messages that were skipped went to the destination of the call that has ended."""
    verdicts, late, outcome = Verdicts(OPTIONS, idempotent=False), claim(1, 0.0), InDoubt("no answer")
    committed(state, 0.0, late)
    state.given_up(late, outcome, verdicts.of(late, outcome), goes_on=True)
    committed(state, 10.0)
    peeked(state, 10.0, 0.0)
    state.answered(late, outcome, verdicts.of(late, outcome))

    assert next_step(state, 10.0).wanted == 2
