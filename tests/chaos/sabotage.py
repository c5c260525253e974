"""Ways to break the delivery, to see that the harness notices. Never used but by the tests of the harness."""
# ruff: noqa: SLF001  # what is broken here is private

import re
import time

from sqlalchemy import Engine, event

from engagement import InDoubt, NotSent, delivery

from .orders import Sabotage

FENCE = re.compile(r"AND \([\w.]*engagement_message_queue\.status = 'sending' AND .*?\)(?= RETURNING)", re.DOTALL)


def commit_sabotage(kind: Sabotage, engine: Engine) -> None:
    {"claim_after_send": send_before_the_commit, "no_fence": drop_the_fence, "resend_doubt": resend_what_is_in_doubt}[
        kind
    ](engine)


def send_before_the_commit(_: Engine) -> None:
    """Commit the claim when its message is sent, as most queues do."""
    settle_and_take = delivery.Delivery._settle_and_take

    def and_send(self, how, connection, *, wanted):
        taken = settle_and_take(self, how, connection, wanted=wanted)
        self._sender.start(taken.claims)
        for claim in taken.claims:
            while claim.handle is not None and not claim.handle.done():
                time.sleep(0.001)
        return taken

    def hold(self, taken):
        self._in_hand |= {claim.message.id: claim for claim in taken.claims}
        self._unacknowledged.clear()

    delivery.Delivery._settle_and_take = and_send
    delivery.Delivery._start = hold


def drop_the_fence(engine: Engine) -> None:
    """Settle by id alone."""

    @event.listens_for(engine, "before_cursor_execute", retval=True)
    def unfenced(_conn, _cursor, statement, parameters, *_):
        if "given_id" in parameters:
            statement, dropped = FENCE.subn("", statement)
            assert dropped == 1, statement
        return statement, parameters


def resend_what_is_in_doubt(_: Engine) -> None:
    """Try again what nobody can say was not sent."""
    decide = delivery.decide

    def optimistic(outcome, **given):
        return decide(NotSent(outcome.reason) if isinstance(outcome, InDoubt) else outcome, **given)

    delivery.decide = optimistic
