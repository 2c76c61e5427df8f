"""Moves batches of pages between memory and files: io_uring, threads, buffered."""
