"""The options of a worker: checked once, never changed."""

from __future__ import annotations

import os
import socket
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TypedDict

from engagement._delivery.hook import OnSettled, why_no_hook
from engagement.messages.checks import checked_age, checked_flag
from engagement.models import checked_schema
from engagement.outcomes import Backoff, Classify, classify_exception, exponential_backoff

LONGEST_NAME = 200


class DeliveryOptions(TypedDict, total=False):
    """The keywords that `process_message_queue` and `Worker` share; `Worker` describes them."""

    concurrency: int
    lease: timedelta
    max_retries: int
    min_interval: timedelta
    send_timeout: timedelta | None
    backoff: Backoff
    classify: Classify | None
    strict: bool
    on_settled: OnSettled | None
    worker_name: str | None
    schema: str | None


class WorkerOptions(DeliveryOptions, total=False):
    """The keywords of `Worker`, which describes them."""

    poll_interval: timedelta
    prune_older_than: timedelta | None
    verify_every: timedelta | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The values of `WorkerOptions`. Raises `ValueError` for one that makes no sense, and names it."""

    concurrency: int = 1
    lease: timedelta = timedelta(minutes=5)
    max_retries: int = 3
    min_interval: timedelta = timedelta(0)
    send_timeout: timedelta | None = None
    backoff: Backoff = field(default_factory=exponential_backoff)
    classify: Classify | None = None
    strict: bool = False
    on_settled: OnSettled | None = None
    worker_name: str | None = None
    poll_interval: timedelta = timedelta(seconds=5)
    schema: str | None = None
    prune_older_than: timedelta | None = None
    verify_every: timedelta | None = None

    def __post_init__(self) -> None:
        zero, name = timedelta(0), self.worker_name
        _check(self.concurrency >= 1, "concurrency", "must be at least 1")
        _check(self.lease > zero, "lease", "must be positive")
        _check(self.max_retries >= 1, "max_retries", "must be at least 1")
        _check(self.min_interval >= zero, "min_interval", "must not be negative")
        _check(self.send_timeout is None or self.send_timeout > zero, "send_timeout", "must be positive")
        _check(isinstance(self.backoff(1), timedelta), "backoff", "must return a timedelta")
        checked_flag("strict", self.strict)
        if self.on_settled is not None and (problem := why_no_hook(self.on_settled)):
            raise ValueError(f"on_settled: {problem}")
        checked_schema(self.schema)
        is_name = name is None or (name.isprintable() and len(name) <= LONGEST_NAME)
        _check(is_name, "worker_name", f"must be printable, and at most {LONGEST_NAME} characters")
        _check(self.poll_interval > zero, "poll_interval", "must be positive")
        if self.prune_older_than is not None:
            checked_age("prune_older_than", self.prune_older_than)
        _check(self.verify_every is None or self.verify_every > zero, "verify_every", "must be positive")

    @property
    def name(self) -> str:
        """The `worker_name`, or host and process."""
        return self.worker_name or f"{socket.gethostname()}:{os.getpid()}"

    @property
    def rule(self) -> Classify:
        """The `classify` that was given, or the default one."""
        return self.classify or partial(classify_exception, strict=self.strict)


def _check(holds: bool, name: str, problem: str) -> None:
    if not holds:
        raise ValueError(f"{name}: {problem}")
