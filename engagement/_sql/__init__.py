"""The table, its statements, and the transactions of our own."""
