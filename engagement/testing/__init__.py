"""What every transport must keep, as tests: point `TransportContract` at yours, and let pytest or unittest run it.

A transport is called here by what calls it in a worker, so an outcome means here what it means there.
"""

from engagement.testing.contract import TransportContract

__all__ = ["TransportContract"]
