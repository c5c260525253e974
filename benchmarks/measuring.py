"""The comparison: contenders take turns round by round, so that other work on the machine hits all alike.

Times mean little on a shared machine. A ratio is the median of the ratios to the floor within each round.
"""

import gc
import resource
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import zip_longest
from pathlib import Path
from statistics import median


@dataclass(frozen=True)
class Contender:
    """Something measured: `run` does one round and returns its rate.

    `floor` names the contender that it is divided by, and `target` the ratio that it has to reach.
    """

    name: str
    run: Callable[[], float]
    floor: str | None = None
    target: float | None = None


@dataclass
class Comparison:
    """The measurements of contenders that took turns. A rate counts `unit` (`messages/s`)."""

    title: str
    contenders: Sequence[Contender]
    unit: str
    rates: dict[str, list[float]] = field(default_factory=dict)

    def ratio(self, name: str, to: str) -> float:
        """Return the median over the rounds of `name`'s rate divided by `to`'s in the same round."""
        return median(rate / floor for rate, floor in zip(self.rates[name], self.rates[to], strict=True))

    def table(self) -> str:
        """Return medians, spread and ratios."""
        header = (self.title, self.unit, "lowest … highest", "ratio", "target", "")
        return aligned([header, *map(self._line, self.contenders)])

    def _line(self, contender: Contender) -> tuple[str, ...]:
        rates = self.rates[contender.name]
        line = (contender.name, number(median(rates)), f"{number(min(rates))} … {number(max(rates))}")
        if contender.floor is None:
            return (*line, "", "", "")
        ratio = self.ratio(contender.name, contender.floor)
        if contender.target is None:
            return (*line, f"{ratio:.2f}", "", "")
        return (*line, f"{ratio:.2f}", f"≥ {contender.target:g}", verdict(ratio >= contender.target))


def compare(
    title: str, contenders: Sequence[Contender], *, rounds: int, unit: str = "messages/s", warm_up: bool = True
) -> Comparison:
    """Let the contenders take turns, every other round backwards; the first round is to warm up and does not count."""
    comparison = Comparison(title, contenders, unit, {contender.name: [] for contender in contenders})
    for turn in range(rounds + warm_up):
        for contender in contenders if turn % 2 == 0 else reversed(contenders):
            rate = contender.run()
            if turn >= warm_up:
                comparison.rates[contender.name].append(rate)
    return comparison


class Timer:
    """How long the block took."""

    seconds = 0.0


@contextmanager
def timed() -> Iterator[Timer]:
    """Time a block, after the garbage of earlier ones is collected."""
    gc.collect()
    timer = Timer()
    started = time.perf_counter()
    yield timer
    timer.seconds = time.perf_counter() - started


def peak_megabytes() -> float:
    """Return the most memory that this process ever held."""
    status = Path("/proc/self/status")
    if status.exists():  # On Linux the peak of `getrusage` begins with the memory of the parent.
        return next(int(line.split()[1]) for line in status.read_text().splitlines() if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024**2 if sys.platform == "darwin" else 1024)


@dataclass(frozen=True)
class Fact:
    """A number that is no rate: a peak, a latency, a count; with the most or the least that it may be."""

    name: str
    value: float
    unit: str
    at_most: float | None = None
    at_least: float | None = None

    def line(self) -> tuple[str, ...]:
        """Return its cells."""
        measured = f"{number(self.value)} {self.unit}"
        if self.at_most is not None:
            return (self.name, measured, f"≤ {number(self.at_most)}", verdict(self.value <= self.at_most))
        if self.at_least is not None:
            return (self.name, measured, f"≥ {number(self.at_least)}", verdict(self.value >= self.at_least))
        return (self.name, measured, "", "")


def facts(title: str, given: Iterable[Fact]) -> str:
    """Return facts as a table."""
    return aligned([(title, "measured", "target", ""), *(fact.line() for fact in given)])


def aligned(lines: Sequence[Sequence[str]]) -> str:
    """Return a Markdown table that also reads well as plain text."""
    widths = [max(map(len, column)) for column in zip_longest(*lines, fillvalue="")]
    header, *rows = [[_padded(cell, widths, place) for place, cell in enumerate(line)] for line in lines]
    rule = ["-" * width if place == 0 else "-" * (width - 1) + ":" for place, width in enumerate(map(len, header))]
    return "\n".join(f"| {' | '.join(line)} |" for line in (header, rule, *rows))


def _padded(cell: str, widths: Sequence[int], place: int) -> str:
    width = max(widths[place], 2)
    return cell.ljust(width) if place == 0 else cell.rjust(width)


def number(value: float) -> str:
    """Return a number with thousands apart and three digits that matter."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def verdict(holds: bool) -> str:
    """Return how a table says that a target was reached, or not."""
    return "met" if holds else "MISSED"
