"""The recording of the demo for the README: `.venv/bin/python -m docs.recording` plays it and writes `images/demo.svg`.

An SVG that moves by itself, in styles that a picture may have on any web page: no script, no font from elsewhere. The
lines appear one by one in a window that scrolls, at a pace to read by. Where motion is unwelcome, the last window
stands still.
"""

from __future__ import annotations

import io
import re
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import MONOKAI

from engagement.demo import run_demo

PICTURE = Path(__file__).parent / "images" / "demo.svg"
WIDTH, WINDOW = 104, 30
LINE_HEIGHT = 24.4
LINE_SECONDS, TITLE_SECONDS, END_SECONDS = 0.12, 1.5, 5.0
TITLE = re.compile(r"\d\. ")

FORMAT = """<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {terminal_width} VISIBLE" role="img">
<title>engagement demo</title>
<style>
.{unique_id}-matrix {{ font: {char_height}px "DejaVu Sans Mono", Menlo, Consolas, monospace; }}
{styles}
.moves, .cover {{ animation: SECONDSs step-end infinite; transform: translateY(FINALpx); }}
.moves {{ animation-name: scroll; }}
.cover {{ animation-name: uncover; transform: translateY(LENGTHpx); }}
@keyframes scroll {{ SCROLL }}
@keyframes uncover {{ UNCOVER }}
@media (prefers-reduced-motion: reduce) {{ .moves, .cover {{ animation: none; }} }}
</style>
<defs>
<clipPath id="{unique_id}-clip-terminal"><rect width="{terminal_width}" height="{terminal_height}"/></clipPath>
{lines}
</defs>
<rect width="100%" height="100%" rx="8" fill="#0c0c0c"/>
<svg x="9" y="9" width="{terminal_width}" height="INNER"><g class="moves">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g>
<rect class="cover" width="100%" height="{terminal_height}" fill="#0c0c0c"/>
</g></svg>
</svg>
"""


def record() -> Console:
    """Play the demo, without its page, into a terminal that nobody sees."""
    screen = Console(
        record=True, force_terminal=True, width=WIDTH, highlight=False, file=io.StringIO(), legacy_windows=False
    )
    run_demo(screen, with_page=False)
    return screen


def keyframes(lines: list[str]) -> tuple[float, str, str]:
    """Return the length in seconds, the steps of the scrolling window, and those of the cover below the last line."""
    moments, now = [], 0.0
    for line in lines:
        now += TITLE_SECONDS if TITLE.match(line) else LINE_SECONDS
        moments.append(now)
    length = now + END_SECONDS

    def steps(shift: float, shown: int) -> str:
        return f"{100 * moments[shown - 1] / length:.2f}% {{ transform: translateY({shift:.1f}px) }}"

    numbers = range(1, len(lines) + 1)
    scroll = " ".join(steps(-LINE_HEIGHT * max(0, shown - WINDOW), shown) for shown in numbers)
    uncover = " ".join(steps(LINE_HEIGHT * shown, shown) for shown in numbers)
    nothing = "0% { transform: translateY(0) } "
    return length, nothing + scroll, nothing + uncover


def picture_of(screen: Console) -> str:
    """Return the recording."""
    lines = screen.export_text(clear=False).splitlines()
    length, scroll, uncover = keyframes(lines)
    inner = LINE_HEIGHT * WINDOW + 4
    svg = screen.export_svg(theme=MONOKAI, code_format=FORMAT, unique_id="demo")
    filled = {
        "SECONDS": f"{length:.1f}",
        "FINAL": f"{-LINE_HEIGHT * max(0, len(lines) - WINDOW):.1f}",
        "LENGTH": f"{LINE_HEIGHT * len(lines):.1f}",
        "SCROLL": scroll,
        "UNCOVER": uncover,
        "INNER": f"{inner:.0f}",
        "VISIBLE": f"{inner + 18:.0f}",
    }
    for name, value in filled.items():
        svg = svg.replace(name, value)
    return svg


if __name__ == "__main__":
    PICTURE.write_text(picture_of(record()))
