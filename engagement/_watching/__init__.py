"""Observers and metrics: telling others about messages."""
