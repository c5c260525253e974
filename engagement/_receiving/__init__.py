"""Records the later words of providers about the messages that they were given."""
