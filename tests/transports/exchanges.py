"""A client of a server on loopback, and one exchange with it."""

from datetime import timedelta

from gateways import outgoing

from engagement import Sent
from engagement.transports.client import Prepared, ProviderClient

SOON, A_MINUTE = timedelta(seconds=0.3), timedelta(minutes=1)
IN_TIME = 8
"""Seconds that a crowded machine may take; without a deadline it would be much longer."""
PREPARED = Prepared("/messages", b"{}")


def client(url: str, **options) -> ProviderClient:
    given = {"headers": {}, "answer_within": timedelta(seconds=5), "verify": False}
    return ProviderClient("test", url, **given | options)


def deliver(client: ProviderClient, prepared: Prepared = PREPARED):
    return client.deliver(
        outgoing(), prepared, lambda answer: Sent(answer.body.decode()) if answer.is_success else None
    )
