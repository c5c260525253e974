"""Claim, send, settle, recover: the work of a worker."""
