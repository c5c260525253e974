"""SQL: the table, its statements by purpose, and the transactions in which they run.

A module of statements is functions that return constructs: no session, no commit, no clock but the database's. Each
statement is built once, and takes its values as bound parameters.
"""
