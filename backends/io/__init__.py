"""Moves pages between memory and files: io_uring, threads or buffered, chosen by a probe.

Nothing here knows keys, slots or an index.
"""
