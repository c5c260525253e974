"""Who is told what happens to messages."""
