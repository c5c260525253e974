"""The next step of a worker: a pure function of its state and the time, without a database, a clock or a thread.

`run` does the step and reports its result to `State`. tests/test_schedule.py plays thousands of histories against both.
See docs/decisions.md#2026-11-29--the-next-step-of-a-worker-is-a-pure-function.
"""

from __future__ import annotations

from math import inf

from engagement._delivery.readiness import NOT_READY, SILENT
from engagement._delivery.state import State
from engagement._delivery.steps import Ask, Beat, Collect, Extend, GiveUp, Nap, Over, Peek, Step, Tell, Transact

STOP_SECONDS = 1.0
"""How soon a stop is heard while nothing is in hand, and an answer of the transport is waited for."""
PATIENCE_SECONDS = 5.0
"""How long a call that was given up may take to end, before a cron job's run ends without it.

See docs/decisions.md#2026-11-29--a-cron-job-ends-though-a-send-hangs."""


def next_step(state: State, now: float) -> Step | Over:
    """Return the step that is to be done now. A question changes nothing."""
    if state.has_given_up:
        return Over(state.failure)
    hand = state.hand
    if hand.is_empty and (last := _last_step(state, now)):
        return last
    if state.send_timeout < inf and (late := hand.handed_over_by(now - state.send_timeout)):
        return GiveUp(late)
    if hand.claims and now >= state.leases.extend_at:
        return Extend([*hand.claims.values()])
    return (_database_step(state, now) if now >= state.outage.retry_at else None) or _wait(state, now)


def _last_step(state: State, now: float) -> Tell | Over | None:
    """With nothing in hand, return the end of the run, or the reason that a person waits for."""
    if state.is_stopped or state.failure is not None or state.left <= 0:
        return Over(state.failure)
    if state.readiness.is_to_be_told(now, at_once=state.until_empty) and not state.outage.is_on:
        why = SILENT if state.readiness.is_asked else state.readiness.why_not
        return Tell(why or NOT_READY)
    has_finished = not state.readiness.is_asked and (state.is_idle or _all_hang(state, now))
    return Over() if state.until_empty and (has_finished or state.readiness.is_silent(now)) else None


def _all_hang(state: State, now: float) -> bool:
    """Whether calls that were given up occupy every place, and have had time to end."""
    overdue = state.hand.overdue
    has_room = len(overdue) < state.concurrency and not (state.sends_many and overdue)
    return not has_room and now > max(call.started_at for call in overdue) + state.send_timeout + PATIENCE_SECONDS


def _database_step(state: State, now: float) -> Step | None:
    """Return the work for the database, or the question to the transport that comes before it."""
    hand = state.hand
    is_to_give_back = bool(state.names.unacknowledged) and now >= state.give_back_at
    # Rather a claim, which adopts and sends those claims, though nothing else is due.
    is_to_look = now >= state.look_at or is_to_give_back
    wanted = 0
    if hand.verdicts or is_to_look:
        wanted = _wanted(state, now)
        has_time = hand.is_empty or bool(wanted and not hand.verdicts and not state.until_empty)
        if state.is_idle and has_time and not is_to_give_back:
            return Peek(state.cursor.start(now))
        if wanted and state.readiness.is_to_be_asked(now):
            return Ask()
        if not state.readiness.is_ready:
            wanted = 0
    if wanted:
        return _claim(state, now, wanted)
    if hand.verdicts or (is_to_give_back and state.failure is None):
        return Transact([*hand.verdicts], gives_back=is_to_give_back)
    return Beat() if state.heartbeat.is_to_go_alone(now) else None


def _wanted(state: State, now: float) -> int:
    """Return how many messages could be started now if the transport is ready."""
    if state.is_stopped or state.failure is not None or now < state.pace.next_at:
        return 0
    if state.outage.is_on and state.hand.verdicts:
        # The verdicts first: a claim that fails would undo them too.
        # docs/decisions.md#2026-11-27--what-is-known-is-settled-before-anything-is-claimed-again
        return 0
    in_use = state.hand.in_use
    if state.sends_many and in_use:
        return 0
    at_once = 1 if state.pace.interval else state.concurrency
    return max(0, int(min(at_once, state.concurrency - in_use, state.left)))


def _claim(state: State, now: float, wanted: int) -> Transact:
    hand = state.hand
    # A batch goes out alone, so no earlier claim had to skip a busy destination.
    passed_over = [] if state.sends_many else [claim.place for claim in (*hand.claims.values(), *hand.overdue)]
    is_last = state.until_empty and not hand.unanswered
    return Transact(
        [*hand.verdicts],
        wanted,
        takes_over=now >= state.recover_at,
        starts=state.cursor.starts(now, passed_over=passed_over, is_last=is_last),
        busy=() if state.sends_many else hand.busy,
    )


def _wait(state: State, now: float) -> Step:
    """Return the wait until something may have to be done."""
    hand = state.hand
    times = [state.look_at, state.give_back_at, state.outage.retry_at, state.pace.next_at, state.readiness.ask_at]
    times.append(state.heartbeat.alone_at)
    if hand.claims:
        times.append(state.leases.extend_at)
        if state.send_timeout < inf:
            times += [claim.started_at + state.send_timeout for claim in hand.unanswered]
    else:
        times.append(now + state.poll_interval)
    until = min(time for time in times if time > now)
    if hand.is_empty and not hand.overdue and not state.readiness.is_asked:
        return Nap(until)
    # With nothing in hand a stop ends the run, and is not to wait for news.
    return Collect(until if hand.claims else min(until, now + STOP_SECONDS))
