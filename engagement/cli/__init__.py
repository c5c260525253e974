"""The command `engagement`, for operators and scheduled jobs.

`group` has the name and place of every command. The modules named with -ing words hold commands, or code that commands
share. A problem is told on one line, without a password, and has an exit status of its kind (3: the database).
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
