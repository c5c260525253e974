"""Whether the transport can send."""

from __future__ import annotations

from math import inf

READY_SECONDS = 1.0
"""How long an answer of the transport is believed."""
TELL_SECONDS = 10.0
"""How long a transport is not ready, or does not answer, before that is written on the oldest due message; then how
often."""
SILENT = "the transport does not say whether it is ready"
NOT_READY = "the transport is not ready"


class Readiness:
    """The transport's last answer. One that has not come yet counts as no; of one that cannot be asked, as yes."""

    def __init__(self, *, can_be_asked: bool) -> None:
        self._can_be_asked = can_be_asked
        self.is_asked = False
        self.why_not: str | None = None
        """The reason of the last no, which may be empty; None after a yes."""
        self._is_ready = not can_be_asked
        self.ask_at = 0.0
        """Until when the last answer is believed."""
        self._silent_at = inf
        self._tell_at = 0.0
        self._was_told = False

    @property
    def is_ready(self) -> bool:
        """Whether the last answer was a yes."""
        return self._is_ready and not self.is_asked

    @property
    def is_refused(self) -> bool:
        """Whether the last answer was a no."""
        return self.why_not is not None and not self.is_asked

    def says(self, now: float) -> str | None:
        """Return in words why nothing is claimed; None if the last answer was a yes."""
        if self.is_silent(now):
            return SILENT
        return None if self.why_not is None else self.why_not or NOT_READY

    def is_to_be_asked(self, now: float) -> bool:
        """Whether the last answer is too old to be believed."""
        return self._can_be_asked and not self.is_asked and now >= self.ask_at

    def is_silent(self, now: float) -> bool:
        """Whether the transport has owed an answer for too long: its `ready` may hang for ever.

        See docs/decisions.md#2026-11-29--a-transport-that-does-not-say-whether-it-is-ready-has-said-no.
        """
        return now >= self._silent_at

    def is_to_be_told(self, now: float, *, at_once: bool) -> bool:
        """Whether a person should read why nothing is sent: `at_once`, or when the no has lasted."""
        if self.is_asked:
            return self.is_silent(now) and now >= self._tell_at
        return self.is_refused and (now >= self._tell_at or (at_once and not self._was_told))

    def asked(self, now: float) -> None:
        """Note that the transport is being asked."""
        self.is_asked = True
        self._silent_at = now + TELL_SECONDS

    def said(self, why_not: str | None, now: float) -> None:
        """Note its answer: None is a yes, a text the reason of a no."""
        if why_not is None or self.why_not is None:
            self._tell_at = now + TELL_SECONDS
            self._was_told = False
        self.is_asked = False
        self._silent_at = inf
        self._is_ready = why_not is None
        self.why_not = why_not
        self.ask_at = now + READY_SECONDS

    def doubt(self) -> None:
        """Ask again before the next claim: a send has just failed, and the next one may fare no better."""
        self.ask_at = 0.0

    def told(self, now: float) -> None:
        """Note that a person can read it."""
        self._was_told = True
        self._tell_at = now + TELL_SECONDS
