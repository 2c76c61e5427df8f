"""The leaf page that gives up its slot: the interface and its policies. Pure: no I/O, no lock, no clock.

A policy sees slots, keys and uses only; which pages are pinned or where they lie belongs to ``index``.
"""
