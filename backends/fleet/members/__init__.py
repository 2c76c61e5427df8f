"""Which nodes there are and what changed: Redis or static peers."""
