"""Slot files on this machine: records, journals, owners and their locks, neighbours, the health of a directory.

Nothing here chooses victims (``cache``) or moves bytes (``backends/io``).
"""
