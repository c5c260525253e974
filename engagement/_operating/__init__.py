"""For operators: looking, keeping house, files."""
