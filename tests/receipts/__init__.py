"""What providers say later: forged, broken, repeated and real requests, read without a network and a database.

A package, so that its files may bear the names of those in `transports`.
"""
