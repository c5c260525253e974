"""Ways to break the delivery, to see that the harness notices. Never used but by the tests of the harness."""
# what is broken here is private

import re
import time

from sqlalchemy import Engine, event

from engagement import InDoubt, NotSent
from engagement._delivery import transaction, verdicts
from engagement._sending import sender

from .orders import Sabotage

FENCE = re.compile(r"AND \([\w.]*engagement_message_queue\.status = 'sending' AND .*?\)(?= RETURNING)", re.DOTALL)


def commit_sabotage(kind: Sabotage, engine: Engine) -> None:
    {"claim_after_send": send_before_the_commit, "no_fence": drop_the_fence, "resend_doubt": resend_what_is_in_doubt}[
        kind
    ](engine)


def send_before_the_commit(_: Engine) -> None:
    """Commit the claim when its message is sent, as most queues do."""
    do, start = transaction.Transactions.do, sender.Sender.start
    senders = []

    def and_send(self, connection, step, how):
        taken = do(self, connection, step, how)
        start(senders[0], taken.claims)
        while senders[0].news.qsize() < len(taken.claims):
            time.sleep(0.001)
        return taken

    build = sender.Sender.__init__

    def note(self, *arguments, **options):
        build(self, *arguments, **options)
        senders.append(self)

    sender.Sender.__init__ = note
    sender.Sender.start = lambda *_: None
    transaction.Transactions.do = and_send


def drop_the_fence(engine: Engine) -> None:
    """Settle by id alone."""

    @event.listens_for(engine, "before_cursor_execute", retval=True)
    def unfenced(_conn, _cursor, statement, parameters, *_):
        if "settlements" in parameters:
            statement, dropped = FENCE.subn("", statement)
            assert dropped == 1, statement
        return statement, parameters


def resend_what_is_in_doubt(_: Engine) -> None:
    """Try again what nobody can say was not sent."""
    decide = verdicts.decide

    def optimistic(outcome, **given):
        return decide(NotSent(outcome.reason) if isinstance(outcome, InDoubt) else outcome, **given)

    verdicts.decide = optimistic
