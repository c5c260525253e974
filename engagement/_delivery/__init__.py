"""What a worker does: claim, send, settle, and recover."""
