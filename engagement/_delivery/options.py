"""The options of a worker: checked once, never changed."""

from __future__ import annotations

import os
import socket
from collections.abc import Collection
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import TypedDict

from sqlalchemy import Engine

from engagement._delivery.hook import OnSettled, why_no_hook
from engagement._delivery.taking import ALL_TYPES, Types
from engagement._sql.own_transactions import check_engine
from engagement.messages.checks import checked_age, checked_flag, checked_text, checked_type
from engagement.models import MOST_SENDER, checked_schema
from engagement.outcomes import Backoff, Classify, classify_exception, exponential_backoff

LONGEST_NAME = 200


class DeliveryOptions(TypedDict, total=False):
    """The keywords that `process_message_queue` and `Worker` share; `Worker` describes them."""

    message_types: Collection[str] | None
    excluding: Collection[str]
    in_order: bool
    sender: str | None
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
    wake_up: bool
    listen_on: Engine | None
    prune_older_than: timedelta | None
    verify_every: timedelta | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """The values of `WorkerOptions`. Raises `ValueError` for one that makes no sense, and names it."""

    message_types: Collection[str] | None = None
    excluding: Collection[str] = ()
    in_order: bool = False
    sender: str | None = None
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
    wake_up: bool = False
    listen_on: Engine | None = None
    schema: str | None = None
    prune_older_than: timedelta | None = None
    verify_every: timedelta | None = None

    def __post_init__(self) -> None:
        _check(self.types.which != "only" or bool(self.types.named), "message_types", "leaves none that could be sent")
        if self.sender is not None:
            checked_text("sender", self.sender, max_characters=MOST_SENDER)
        zero, name = timedelta(0), self.worker_name
        _check(self.concurrency >= 1, "concurrency", "must be at least 1")
        _check(self.lease > zero, "lease", "must be positive")
        _check(self.max_retries >= 1, "max_retries", "must be at least 1")
        _check(self.min_interval >= zero, "min_interval", "must not be negative")
        _check(self.send_timeout is None or self.send_timeout > zero, "send_timeout", "must be positive")
        _check(isinstance(self.backoff(1), timedelta), "backoff", "must return a timedelta")
        checked_flag("in_order", self.in_order)
        checked_flag("strict", self.strict)
        if self.on_settled is not None and (problem := why_no_hook(self.on_settled)):
            raise ValueError(f"on_settled: {problem}")
        checked_schema(self.schema)
        is_name = name is None or (name.isprintable() and len(name) <= LONGEST_NAME)
        _check(is_name, "worker_name", f"must be printable, and at most {LONGEST_NAME} characters")
        _check(self.poll_interval > zero, "poll_interval", "must be positive")
        checked_flag("wake_up", self.wake_up)
        if self.listen_on is not None:
            _check(self.wake_up, "listen_on", "needs wake_up=True")
            check_engine(self.listen_on, "listen_on")
        if self.prune_older_than is not None:
            checked_age("prune_older_than", self.prune_older_than)
        _check(self.verify_every is None or self.verify_every > zero, "verify_every", "must be positive")

    @property
    def types(self) -> Types:
        """The message types that are taken."""
        excluded = _checked_types("excluding", self.excluding)
        if self.message_types is not None:
            return Types("only", _checked_types("message_types", self.message_types) - excluded)
        return Types("but", excluded) if excluded else ALL_TYPES

    @property
    def name(self) -> str:
        """The `worker_name`, or host and process."""
        return self.worker_name or f"{socket.gethostname()}:{os.getpid()}"

    @property
    def rule(self) -> Classify:
        """The `classify` that was given, or the default one."""
        return self.classify or partial(classify_exception, strict=self.strict)


def _checked_types(name: str, types: Collection[str]) -> frozenset[str]:
    # A text is a collection of letters, each of which could be a type.
    _check(not isinstance(types, str), name, "must be a list of message types, not one text")
    return frozenset(checked_type(name, each) for each in types)


def _check(holds: bool, name: str, problem: str) -> None:
    if not holds:
        raise ValueError(f"{name}: {problem}")
