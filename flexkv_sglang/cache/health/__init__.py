"""Looks after what a tier relies on and somebody else may change: its files at their paths.

Called by ``upkeep``, on the threads of a directory.
"""
