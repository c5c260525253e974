"""The bad ends of a command: one line for a person, an exit status for a program."""

from __future__ import annotations

import click

NEEDS_ATTENTION, USAGE, NO_DATABASE = 1, 2, 3


class Problem(click.ClickException):
    """The end of a command, with the reason on one line."""

    exit_code = USAGE

    def __init__(self, message: str) -> None:
        super().__init__(" ".join(message.split()))


class DatabaseProblem(Problem):
    """The database cannot be reached, or is not migrated."""

    exit_code = NO_DATABASE


def needs_attention() -> click.exceptions.Exit:
    """Return the end of a command that did its work and found a case for a person (one message was sent already)."""
    return click.exceptions.Exit(NEEDS_ATTENTION)
