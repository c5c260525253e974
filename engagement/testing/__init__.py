"""The contract of every transport, as tests: point `TransportContract` at yours, and let pytest or unittest run it.

The tests call a transport through a worker's own `Sender`, so an outcome has the same meaning here as there.
"""

from engagement.testing.contract import TransportContract

__all__ = ["TransportContract"]
