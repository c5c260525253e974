"""The options of commands that listen, and their problems."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from typing import Any, TypeVar

import click

from engagement.cli.problems import Problem

F = TypeVar("F", bound=Callable[..., Any])


def listens(port: int) -> Callable[[F], F]:
    """Give a command --host, --port and --public."""
    options = (
        click.option("--host", default="127.0.0.1", metavar="HOST", help="Where to listen."),
        click.option(
            "--port", default=port, type=click.IntRange(0, 65_535), metavar="N", help="0 takes any that is free."
        ),
        click.option("--public", is_flag=True, help="Allow a --host that other machines can reach, over plain HTTP."),
    )

    def give(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return give


def is_loopback(host: str) -> bool:
    """Tell whether only this machine can reach `host`."""
    try:
        return host == "localhost" or ip_address(host).is_loopback
    except ValueError:
        return False


def check_reach(host: str, *, public: bool) -> None:
    """Refuse a host that other machines can reach, unless that is meant."""
    if not public and not is_loopback(host):
        raise Problem(f"--host {host} can be reached by other machines. If that is meant, add --public")


@contextmanager
def told_if_taken(host: str, port: int) -> Iterator[None]:
    """Turn the errors of a place where nobody can listen into problems."""
    try:
        yield
    except (OSError, OverflowError) as error:
        raise Problem(f"cannot listen on {host} port {port}: {error}") from None
