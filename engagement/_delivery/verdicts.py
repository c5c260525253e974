"""Turns outcomes into verdicts, by a worker's options."""

from __future__ import annotations

from datetime import timedelta

from engagement._claim import Claim
from engagement._delivery.options import Options
from engagement._logging import logger
from engagement.outcomes import Outcome, Verdict, decide, exponential_backoff

DEFAULT_BACKOFF = exponential_backoff()


class Verdicts:
    """Decides an outcome by the options: `NotSent` at the third failure is `failed`."""

    def __init__(self, options: Options, *, idempotent: bool) -> None:
        self._options = options
        self._idempotent = idempotent

    def of(self, claim: Claim, outcome: Outcome) -> Verdict:
        """Return the verdict."""
        return decide(
            outcome,
            retry_count=claim.message.retry_count,
            max_retries=self._options.max_retries,
            idempotent=self._idempotent,
            worker_lost=claim.lost_workers > 0,
            backoff=self._backoff,
        )

    def _backoff(self, failures: int) -> timedelta:
        """Ask the host's rule. If it breaks, the default one holds: an outcome is never lost to a rule."""
        try:
            wait = self._options.backoff(failures)
        except (Exception, SystemExit) as error:  # noqa: BLE001 - the host's code, as above
            logger.error("engagement.backoff_failed error=%s", type(error).__name__)
        else:
            if isinstance(wait, timedelta):
                return wait
            logger.error("engagement.backoff_failed type=%s", type(wait).__name__)
        return DEFAULT_BACKOFF(failures)
