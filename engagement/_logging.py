"""The logger of all modules. Logs name ids and events, never people or the text of a message."""

from __future__ import annotations

import logging

logger = logging.getLogger("engagement")
logger.addHandler(logging.NullHandler())
