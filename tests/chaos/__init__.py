"""Proof by force: real workers are killed and frozen, the database is cut off, and a ledger outside it tells the rest.

A package, so that its conftest does not take the place of the one above.
"""
