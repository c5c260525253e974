"""The group of all commands: their names, their places, their help.

A command's module is imported when the command is used.
"""

from __future__ import annotations

import os
import signal
import sys
import traceback
from collections.abc import Callable
from importlib import import_module
from typing import Any, NoReturn

import click

from engagement.cli.cleaning import cleaned_streams
from engagement.cli.problems import NEEDS_ATTENTION, USAGE, Problem

SECTIONS = {
    "Set up": {
        "upgrade": "migrating:upgrade",
        "adopt": "migrating:adopt",
        "downgrade": "migrating:downgrade",
        "current": "migrating:current",
        "demo": "offline:demo",
        "lint-catalogues": "offline:lint_catalogues",
    },
    "Queue and send": {
        "queue": "queueing:queue",
        "process": "delivering:process",
        "work": "delivering:work",
        "receive": "receiving:receive",
    },
    "Look": {
        "status": "looking:status",
        "list": "listing:list_",
        "show": "listing:show_one",
        "person": "finding:person",
        "workers": "working:workers",
        "suppressed": "suppressing:suppressed",
        "verify": "looking:verify",
        "admin": "serving:admin",
    },
    "Act": {
        "pause": "pausing:pause",
        "resume": "pausing:resume",
        "cancel": "changing:cancel",
        "reschedule": "changing:reschedule",
        "retry": "changing:retry",
        "resolve": "changing:resolve",
        "suppress": "suppressing:suppress",
        "unsuppress": "suppressing:unsuppress",
        "forget-user": "blanking:forget_user",
        "prune": "blanking:prune",
    },
}
"""Every command, by its purpose: `module:function` below this package.

The help imports all modules. So a library that only an extra brings (uvicorn) is imported where it is used.
"""

OVERVIEW = """\b
See it work, on a database that is gone afterwards:
  engagement demo

\b
On your own database:
  export ENGAGEMENT_DATABASE_URL=postgresql://user@host/name
  engagement upgrade
  engagement queue messages.jsonl
  engagement process --transport myapp.whatsapp:send
  engagement status

\b
Exit status:
  0    all is well; also after a first signal, once the sends in hand are settled
  1    something needs attention: bad lines (queue), failed messages or messages in
       doubt (process), broken promises (verify), problems (lint-catalogues), a message
       that was not changed as asked, or is not there; an address that is not on the
       suppression list; or a person said no
  2    the command was not understood, or something that it needs is missing
  3    the database cannot be reached, refused, or is not migrated
  130  interrupted (SIGINT); where the first signal waits for sends, by the second
  143  likewise by SIGTERM

\b
Completion of commands and options, in ~/.bashrc (zsh and fish likewise):
  eval "$(_ENGAGEMENT_COMPLETE=bash_source engagement)\""""


class Command(click.Command):
    """A command that runs only with every required value, and with no empty one.

    docs/decisions.md#2026-11-29--nothing-is-taken-for-an-answer-and-two-answers-are-none
    """

    def invoke(self, ctx: click.Context) -> Any:
        """Run the command."""
        for parameter in self.params:
            given = ctx.params[str(parameter.name)]
            # click asks for it too, but from 8.3 on lets `required=True` pass beside `default=None`.
            if given is None and parameter.required:
                raise click.MissingParameter(ctx=ctx, param=parameter)
            # A shell's variable may not be set: `--schema "$SCHEMA"` would upgrade, or prune, another table.
            if given == "":
                raise click.BadParameter("is empty.", ctx=ctx, param=parameter)
        return super().invoke(ctx)


def command(name: str | None = None, **how: Any) -> Callable[[Callable[..., Any]], Command]:
    """Make a command of a function, as `click.command` does."""
    return click.command(name, cls=Command, **how)


class Commands(click.Group):
    """A group that imports a command at its use, and tells a problem on one line."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # noqa: ARG002 - click's signature
        """Return the names of all commands, in the order of the help."""
        return [name for commands in SECTIONS.values() for name in commands]

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # noqa: ARG002
        """Return a command, or None if there is none of that name."""
        for commands in SECTIONS.values():
            if cmd_name in commands:
                module, _, function = commands[cmd_name].partition(":")
                command: click.Command = getattr(import_module(f"engagement.cli.{module}"), function)
                return command
        return None

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the commands by their purpose."""
        width = max(len(name) for name in self.list_commands(ctx))
        for section, commands in SECTIONS.items():
            with formatter.section(section):
                found = [(name, self.get_command(ctx, name)) for name in commands]
                rows = [
                    (name.ljust(width), command.get_short_help_str(formatter.width - width - 6))
                    for name, command in found
                    if command
                ]
                formatter.write_dl(rows)

    def main(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Run a command, and leave with its status."""
        with cleaned_streams():
            sys.exit(self._status_of(*args, **kwargs) or 0)

    def _status_of(self, *args: Any, **kwargs: Any) -> Any:
        try:
            _check_streams()
            status = super().main(*args, **kwargs | {"standalone_mode": False})
            sys.stdout.flush()
        except click.Abort:
            click.echo("engagement: interrupted", err=True)
            status = 128 + signal.SIGINT
        except click.UsageError as error:
            command = error.ctx.command_path if error.ctx else "engagement"
            click.echo(f"{command}: {' '.join(error.format_message().split())} See: {command} --help", err=True)
            status = error.exit_code
        except click.ClickException as error:
            click.echo(f"engagement: {error.format_message()}", err=True)
            status = error.exit_code
        except OSError as error:
            click.echo(f"engagement: {error.strerror or error}", err=True)
            status = USAGE
            _give_up_output()
        except (
            SystemExit
        ) as error:  # A host's module says why it gives up: Python would print it on the stream beneath.
            if error.code is None or isinstance(error.code, int):
                raise
            click.echo(str(error.code), err=True)
            status = NEEDS_ATTENTION
        except Exception:  # noqa: BLE001 - Python would show it likewise, but on the stream beneath
            traceback.print_exc()
            status = NEEDS_ATTENTION
        return status


def _check_streams() -> None:
    """Refuse to work without an output: a socket to the database would be opened in its place."""
    if sys.stdout is None:
        raise Problem("standard output is closed")
    # Nobody to ask, and nobody to tell.
    sys.stdin = sys.stdin or open(os.devnull, encoding="utf-8")  # noqa: SIM115, PTH123 - until the process ends
    sys.stderr = sys.stderr or open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115, PTH123


def _give_up_output() -> None:
    """Drop output that cannot be written: at its end the interpreter would try again, and complain."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@click.group(
    cls=Commands,
    epilog=OVERVIEW,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"]},
)
@click.version_option(package_name="engagement", message="%(prog)s %(version)s")
@click.pass_context
def cli(context: click.Context) -> None:
    """Queue proactive messages once, and never send one twice."""
    if context.invoked_subcommand is None:
        click.echo(context.get_help())
