"""The sender's side of a run: hear its news, ask whether it is ready, give up calls that take too long."""

from __future__ import annotations

import threading
from datetime import timedelta
from queue import Empty

from engagement._claim import Claim, clock
from engagement._delivery.listening import STOP_SECONDS
from engagement._delivery.options import Options
from engagement._delivery.readiness import SILENT
from engagement._delivery.state import State
from engagement._delivery.verdicts import Verdicts
from engagement._logging import logger
from engagement._sending.answers import is_yes
from engagement._sending.protocols import Transport
from engagement._sending.sender import Begun, News, Sender, Woken
from engagement.models import EARLIEST
from engagement.outcomes import InDoubt, Outcome, Postpone, clean_reason


class Dispatch:
    """Passes the sender's news on to `state`, with a verdict for each answer."""

    def __init__(
        self, transport: Transport, sender: Sender, options: Options, state: State, verdicts: Verdicts
    ) -> None:
        self._transport = transport
        self._sender = sender
        self._send_timeout = options.send_timeout or timedelta(0)
        self._may_be_woken = options.wake_up
        self._state = state
        self._verdicts = verdicts

    def hear(self, seconds: float = 0.0) -> None:
        """Wait for news, then take all that are there."""
        news = self._sender.news
        try:
            self._note(news.get(timeout=seconds) if seconds > 0 else news.get_nowait())
            while True:
                self._note(news.get_nowait())
        except Empty:
            pass

    def nap(self, seconds: float, stop: threading.Event) -> None:
        """Wait for a stop, or for a wake-up if there is one to be heard."""
        if not self._may_be_woken:
            stop.wait(max(seconds, 0.0))
        elif seconds > 0:
            self.hear(min(seconds, STOP_SECONDS))  # One thread cannot wait for news and for a stop.

    def ask(self) -> None:
        """Ask the transport whether it is ready."""
        self._sender.ask_ready()
        self._state.asked(clock())

    def give_up(self, claim: Claim) -> None:
        """Wait no longer for an answer, and take the call back if it has not begun.

        See docs/decisions.md#2026-11-27--a-send-that-was-given-up-does-not-begin-and-one-in-the-loop-has-the-last-word.
        """
        waited = f"{self._send_timeout.total_seconds():g} s"
        goes_on = claim.handle is not None and not claim.handle.cancel()
        outcome: Outcome = InDoubt(f"no answer within {waited}")
        if not goes_on and not claim.lost_workers:
            outcome = Postpone(EARLIEST, f"it could not begin within {waited}")
        self._state.given_up(claim, outcome, self._verdicts.of(claim, outcome), goes_on=goes_on)

    def note_silence(self, why: str) -> None:
        """Log that there is no answer. A reason that came with one is logged when it comes."""
        if why == SILENT:
            logger.warning("engagement.not_ready reason=%s", why)

    def _note(self, news: News) -> None:
        # Not by `match`, whose class patterns take as long as the rest.
        if isinstance(news, tuple):
            claim, outcome = news
            self._state.answered(claim, outcome, self._verdicts.of(claim, outcome))
        elif isinstance(news, Begun):
            self._state.begun(news.claim)
        elif isinstance(news, Woken):
            news.is_told = False  # Before the look: what is queued after it began is told anew.
            self._state.woken(clock())
        else:
            self._note_readiness(is_ready=is_yes(news.said))

    def _note_readiness(self, *, is_ready: bool) -> None:
        why_not = None if is_ready else _why_not_ready(self._transport)
        if why_not is not None and why_not != self._state.readiness.why_not:
            logger.warning("engagement.not_ready reason=%s", why_not or "unknown")
        self._state.ready_said(why_not, clock())


def _why_not_ready(transport: object) -> str:
    """Return the transport's own reason for not being ready; empty if it gives none."""
    try:
        return clean_reason(getattr(transport, "why_not_ready", None)) or ""
    except Exception:  # noqa: BLE001 - the host's code must not end the run
        return ""
