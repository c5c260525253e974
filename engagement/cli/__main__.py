"""`python -m engagement.cli` is the command `engagement`."""

from engagement.cli import main

main()
