"""The command `engagement`: what operators and scheduled jobs call.

`group` names all commands and where each is; the modules named with -ing words are either commands, or what commands
share. What is wrong is said on one line, without a password, and with an exit status that tells.
"""

from __future__ import annotations

import sys
from typing import NoReturn

try:
    import click  # noqa: F401
    import rich  # noqa: F401
except ModuleNotFoundError as missing:
    # Nothing below can be defined without them.
    name = (missing.name or "").partition(".")[0]
    sys.stderr.write(f"engagement: {name} is missing. Run: pip install 'engagement[cli]'\n")
    raise SystemExit(2) from None

from engagement.cli.group import cli

__all__ = ["cli", "main"]


def main() -> NoReturn:
    """Be the command `engagement`."""
    cli.main(prog_name="engagement")
