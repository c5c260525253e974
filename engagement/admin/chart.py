"""A chart of the messages due and sent over time, as rectangles and labels. Templates draw it, without a script."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime

from engagement._operating.overview import Activity

WIDTH, HEIGHT = 1000, 100
"""The units of the rectangles. They are stretched to the page, and the labels are not, so a phone can show them."""
LINES = 4
LABELS = 8
_BAR, _GAP = 0.38, 0.08
_ROUND = (1, 1.5, 2, 3, 4, 5, 8, 10)


@dataclass(frozen=True, slots=True)
class Bar:
    """A rectangle for the due or the sent messages of a bucket."""

    kind: str
    x: float
    y: float
    width: float
    height: float


@dataclass(frozen=True, slots=True)
class Chart:
    """The buckets with their pairs of bars, the amounts beside the lines from the top down, and the times below."""

    buckets: tuple[tuple[Activity, Bar, Bar], ...]
    amounts: tuple[int, ...]
    times: tuple[datetime, ...]
    width: int = WIDTH
    height: int = HEIGHT


def chart_of(activity: Sequence[Activity]) -> Chart:
    """Lay out a pair of bars for each bucket, all on one scale that begins at zero."""
    step = _round_step(max((max(bucket.due, bucket.sent) for bucket in activity), default=0))
    slot = WIDTH / max(len(activity), 1)

    def bar(kind: str, number: int, offset: float, count: int) -> Bar:
        height = round(HEIGHT * count / (step * LINES), 2)
        return Bar(kind, round((number + offset) * slot, 2), round(HEIGHT - height, 2), round(_BAR * slot, 2), height)

    buckets = tuple(
        (
            bucket,
            bar("due", number, _GAP, bucket.due),
            bar("sent", number, _GAP + _BAR + _GAP, bucket.sent),
        )
        for number, bucket in enumerate(activity)
    )
    every = -(-len(activity) // LABELS) or 1
    times = tuple(bucket.at for bucket in activity[::every])
    return Chart(buckets, tuple(step * line for line in range(LINES, -1, -1)), times)


def _round_step(highest: int) -> int:
    """Return the smallest round number that reaches `highest` in `LINES` steps (30 for 120)."""
    power = 1
    while True:
        for factor in _ROUND:
            step = factor * power
            if step == int(step) and step * LINES >= highest:
                return int(step)
        power *= 10
