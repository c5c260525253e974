"""The admin page: the state of the queue, the way of each message, and a person's decisions about it.

It shows the same as the command, and acts through the repository. It cannot write, edit or delete a row.
docs/decisions.md#2026-11-24--the-admin-page-stands-on-starlette-admin-of-which-it-uses-little
"""

from engagement.admin.application import create_admin
from engagement.admin.guards import anyone

__all__ = ["anyone", "create_admin"]
