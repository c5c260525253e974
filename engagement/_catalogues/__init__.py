"""Message catalogues, checked."""
