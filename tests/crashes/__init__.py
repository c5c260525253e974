"""Crashes, timeouts and lost databases: what was claimed is sent at most once, and what is known is never forgotten.

A package, so that its conftest does not take the place of the one above.
"""
