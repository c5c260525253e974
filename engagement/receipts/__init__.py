"""Reads the later words of providers about the messages that they were given, and has endpoints to receive them.

A source checks the signature of a request and turns its bytes into receipts; it touches nothing else. `ReceiptsASGI`
and `ReceiptsWSGI` are applications to mount, which record the receipts of one source.
"""

from engagement.receipts.asgi import ReceiptsASGI
from engagement.receipts.sources import ReceiptSource, UnreadableReceipts, Unsigned
from engagement.receipts.wsgi import ReceiptsWSGI

__all__ = ["ReceiptSource", "ReceiptsASGI", "ReceiptsWSGI", "UnreadableReceipts", "Unsigned"]
