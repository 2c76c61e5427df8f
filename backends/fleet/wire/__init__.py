"""Messages between nodes, their encoding, and one authenticated connection."""
