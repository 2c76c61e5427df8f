"""Messages between nodes, their bytes, and one authenticated connection.

No limits on memory and no retries: those are in reader and server.
"""
