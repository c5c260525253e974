"""Which messages a worker takes, and leaves to others."""

from __future__ import annotations

from dataclasses import dataclass

from engagement._sql import parameters
from engagement._sql.claiming import WhichTypes


@dataclass(frozen=True, slots=True)
class Types:
    """The message types that a worker takes: all, `only` those that are `named`, or all `but` those."""

    which: WhichTypes = "all"
    named: frozenset[str] = frozenset()

    @property
    def values(self) -> dict[str, str]:
        """The parameter of the statements that look for work."""
        return {} if self.which == "all" else {"types": parameters.SEPARATOR.join(sorted(self.named))}


ALL_TYPES = Types()
