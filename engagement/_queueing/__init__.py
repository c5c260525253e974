"""Queueing: from a host's messages to rows of the table, in the host's own transaction."""
