"""The admin page: how the queue stands, what became of a message, and what is to become of it.

It shows what the command tells and does what the repository does. It cannot write, edit or delete a row.
"""

from engagement.admin.application import create_admin
from engagement.admin.guards import anyone

__all__ = ["anyone", "create_admin"]
