"""Records what providers say later of the messages that they were given."""
