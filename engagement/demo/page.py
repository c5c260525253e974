"""The end of the demo: the admin page of its day."""

from __future__ import annotations

import threading
import webbrowser
from datetime import UTC

from rich.console import Console
from sqlalchemy import Engine

from engagement.admin.serving import serve


def is_wanted(screen: Console) -> bool:
    """Ask the person at a terminal. Nobody else is asked, and gets none."""
    if not screen.is_terminal:
        return False
    try:
        answer = screen.input("\nOpen the page of this day in a browser? \\[Y/n] ")
    except EOFError:
        return False
    return answer.strip().lower() in {"", "y", "yes"}


def show_page(screen: Console, engine: Engine) -> None:
    """Serve the page on a free port of this machine until Ctrl-C or SIGTERM, and open it in the person's browser."""

    def open_it(address: str) -> None:
        screen.print(f"\nThe page of this day: {address}", soft_wrap=True)
        screen.print("All may be tried there. Ctrl-C ends it, and the demo.")
        # A browser in the terminal returns only when it is left, and the page must be served meanwhile.
        threading.Thread(target=webbrowser.open, args=(address,), daemon=True).start()

    serve(engine, "127.0.0.1", 0, open_it, may_reveal=True, tz=UTC)
