"""The contract of every transport, as tests."""

from __future__ import annotations

from dataclasses import replace

from engagement.outcomes import InDoubt, NotSent, Refused, Sent
from engagement.testing.calls import calling, expect, require, threads_that_interrupt_each_other
from engagement.testing.far_side import FarSide


class TransportContract(FarSide):
    """The contract of a transport. Subclass it as `class TestMine(TransportContract)`, and say how to reach yours.

    Needed are `make_transport` and the four `far_side_…` hooks that raise `NotImplementedError`. Each hook sets the
    behaviour of the far side from then on. A test calls one before `make_transport`, and some call a second one after
    it. The far side is yours: best a real server on loopback. Set it up in an autouse fixture, or in `setup_method`.

    `answers_within` is the longest that a send may take, time-out included. `secrets` must show up nowhere
    (a provider's key: not in the `repr`, a reason or the log).
    """

    def test_what_is_accepted_is_sent(self) -> None:
        """A message that the far side takes is `Sent`, and has one effect."""
        self.far_side_accepts()
        with calling(self) as calls:
            message = self.make_message()
            answer = calls.send(message)
            expect(answer, Sent, "the far side took the message")
            calls.expect_effects(message, at_least=1, at_most=1)

    def test_what_is_refused_is_refused(self) -> None:
        """An ordinary refusal is `Refused`, without an exception and without an effect."""
        self.far_side_refuses()
        with calling(self) as calls:
            answer = calls.send(self.make_message())
            require(answer.error is None, f"an ordinary refusal raised {type(answer.error).__name__}")
            expect(answer, Refused, "the far side never will take the message")

    def test_silence_is_a_doubt(self) -> None:
        """A far side that took the request and says nothing may have acted: `InDoubt`, in time, and no second try."""
        self.far_side_times_out()
        with calling(self) as calls:
            message = self.make_message()
            expect(calls.send(message), InDoubt, "the far side took the request and may have acted")
            calls.expect_effects(message, at_most=1)

    def test_a_broken_connection_is_a_doubt(self) -> None:
        """A connection that breaks after the request was written leaves a doubt, and no second try is made."""
        self.far_side_breaks_off()
        with calling(self) as calls:
            message = self.make_message()
            expect(calls.send(message), InDoubt, "the far side took the request and may have acted")
            calls.expect_effects(message, at_most=1)

    def test_what_cannot_be_reached_was_not_sent(self) -> None:
        """Without a connection nothing left: `NotSent`, so that it is tried again."""
        self.far_side_unreachable()
        with calling(self) as calls:
            expect(calls.send(self.make_message()), NotSent, "no connection was made, so nothing left")

    def test_an_idempotent_transport_has_one_effect(self) -> None:
        """A transport that says it is idempotent may send a delivery id again: `Sent` both times, and one effect."""
        self.far_side_accepts()
        with calling(self) as calls:
            calls.skip_unless_idempotent()
            message = self.make_message()
            for attempt in (1, 2):
                answer = calls.send(replace(message, attempt=attempt, retry_count=attempt - 1))
                expect(answer, Sent, f"the far side has the message (attempt {attempt})")
            calls.expect_effects(message, at_least=1, at_most=1)

    def test_sending_again_resolves_a_doubt(self) -> None:
        """With an idempotent transport, a delivery id that is sent again after a time-out has one effect."""
        self.far_side_times_out()
        with calling(self) as calls:
            calls.skip_unless_idempotent()
            message = self.make_message()
            calls.send(message)
            self.far_side_accepts()
            again = calls.send(replace(message, attempt=2, retry_count=1))
            expect(again, Sent, "the far side takes messages again")
            calls.expect_effects(message, at_least=1, at_most=1)

    def test_look_up_finds_what_was_sent(self) -> None:
        """`look_up` says `Sent` of a message that was, and never of one that was not."""
        self.far_side_accepts()
        with calling(self) as calls:
            calls.skip_without("look_up")
            message = self.make_message()
            calls.send(message)
            expect(calls.look_up(message), Sent, "look_up was asked for a message that was sent")
            unknown = calls.look_up(self.make_message())
            require(not isinstance(unknown.outcome, Sent), "look_up says Sent of a message that was never sent")

    def test_look_up_without_an_answer_knows_nothing(self) -> None:
        """While the far side cannot be reached, `look_up` does not know: `NotSent` would send a second time."""
        self.far_side_accepts()
        with calling(self) as calls:
            calls.skip_without("look_up")
            message = self.make_message()
            calls.send(message)
            self.far_side_unreachable()
            answer = calls.look_up(message)
            require(not isinstance(answer.outcome, NotSent), "look_up says NotSent without an answer of the far side")

    def test_look_up_does_not_deny_what_timed_out(self) -> None:
        """A message that the far side acted on before the time-out is never `NotSent` in `look_up`."""
        self.far_side_times_out()
        with calling(self) as calls:
            calls.skip_without("look_up")
            message = self.make_message()
            calls.send(message)
            self.far_side_accepts()
            denies = isinstance(calls.look_up(message).outcome, NotSent)
            require(not (denies and self.effects_of(message)), "look_up says NotSent of what has had an effect")

    def test_ready_tells_whether_it_can_send(self) -> None:
        """`ready` is True while the far side takes messages."""
        self.far_side_accepts()
        with calling(self) as calls:
            calls.skip_without("ready")
            answer = calls.ready()
            require(answer is True, f"ready answered {answer!r} while the far side takes messages")

    def test_ready_is_false_without_a_far_side(self) -> None:
        """`ready` is False, or raises, in time, while the far side cannot be reached."""
        self.far_side_unreachable()
        with calling(self) as calls:
            calls.skip_without("ready")
            answer = calls.ready()
            require(answer is False or isinstance(answer, Exception), f"ready answered {answer!r} without a far side")

    def test_threads_do_not_mix_messages(self) -> None:
        """Messages that are sent at the same time all arrive, each once."""
        self.far_side_accepts()
        with calling(self, concurrency=8) as calls, threads_that_interrupt_each_other():
            messages = [self.make_message() for _ in range(24)]
            answers = calls.send_at_once(messages)
            for message, answer in zip(messages, answers, strict=True):
                expect(answer, Sent, "the far side takes messages")
                calls.expect_effects(message, at_least=1, at_most=1)
            ids = [answer.outcome.provider_message_id for answer in answers if isinstance(answer.outcome, Sent)]
            given = [provider_id for provider_id in ids if provider_id is not None]
            require(len(set(given)) == len(given), "two messages that were sent at once have one provider id")
