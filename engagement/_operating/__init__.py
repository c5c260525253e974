"""What operators need: looking, keeping house, files."""
