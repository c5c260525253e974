"""Reads the later words of providers about the messages that they were given.

A source checks the signature of a request and turns its bytes into receipts; it touches nothing else.
"""
