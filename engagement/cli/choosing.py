"""The choice of messages: the filters that commands have in common, and the name of one message."""

from __future__ import annotations

from collections.abc import Callable
from functools import wraps
from typing import Any, TypeVar, cast

import click

from engagement._operating.lists import Filters
from engagement._operating.person import KEY
from engagement.cli.parameters import moment_ago
from engagement.cli.showing import for_person
from engagement.messages.checks import id_typed
from engagement.models import EngagementMessage, MessageStatus
from engagement.repository import EngagementMessageRepository

F = TypeVar("F", bound=Callable[..., Any])

_MOMENTS = {
    "created_since": "Queued at this time or later: 2026-11-24T09:00Z, or 2h for two hours ago",
    "created_until": "Queued before this time",
    "scheduled_since": "Wanted at this time or later",
    "scheduled_until": "Wanted before this time",
}
_RECEIPTS = ("delivered", "read", "undeliverable")


def filtered(*statuses: MessageStatus, by_receipt: bool = False) -> Callable[[F], Callable[..., Any]]:
    """Give a command the options that choose messages, as its argument `filters`; those of receipts if `by_receipt`.

    Without `--status`, messages with any of `statuses` are chosen. With a single one there is no option `--status`.
    """

    def decorate(command: F) -> Callable[..., Any]:
        @wraps(command)
        def run(*, status: tuple[str, ...] = (), **options: Any) -> Any:
            names = ("user_id", "message_type", *_MOMENTS, *(_RECEIPTS if by_receipt else ()))
            given = {name: value for name in names if (value := options.pop(name)) is not None}
            if status:
                given["status"] = status
            return command(filters=cast("Filters", given), **options)

        for option in reversed([*_options(statuses), *(_receipt_options() if by_receipt else ())]):
            run = option(run)
        return run

    return decorate


def _options(statuses: tuple[MessageStatus, ...]) -> list[Callable[[Any], Any]]:
    words = [str(status) for status in statuses]
    status = click.option("--status", multiple=True, type=click.Choice(words), help="May be given more than once.")
    return [
        *([status] if len(statuses) > 1 else []),
        click.option("--user", "user_id", metavar="ID", help="Of this user."),
        click.option("--type", "message_type", metavar="NAME", help="Of this message type."),
        *(
            click.option(f"--{name.replace('_', '-')}", type=moment_ago, metavar="TIME", help=f"{words}.")
            for name, words in _MOMENTS.items()
        ),
    ]


def _receipt_options() -> list[Callable[[Any], Any]]:
    return [
        click.option(
            f"--{word}/--not-{word}",
            default=None,
            help=f"A provider has said that it was {word}, or it is sent and none has said so.",
        )
        for word in ("delivered", "read")
    ] + [
        click.option(
            "--undeliverable", is_flag=True, flag_value=True, default=None, help="Its provider has given it up."
        )
    ]


def described(filters: Filters) -> str:
    """Return the filters in words, for a question."""
    words = {
        "status": "status",
        "user_id": "user",
        "message_type": "type",
        **{name: name.replace("_", " ") for name in _MOMENTS},
    }
    told = []
    for name, value in filters.items():
        shown = " or ".join(value) if isinstance(value, tuple) else for_person(name, value)
        told.append(f"{words[name]} {shown}")
    return ", ".join(told)


def find_message(repository: EngagementMessageRepository, which: str) -> EngagementMessage | None:
    """Return the message that `which` names: a number is an id, anything else is an idempotency key."""
    if which.isascii() and which.isdecimal():
        return repository.get_message(id_typed(which))
    return repository.get_message_by_key(which.removeprefix(KEY))
