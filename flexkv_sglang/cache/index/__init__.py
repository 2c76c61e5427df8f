"""The slot of each page: keys, states, pins, links between pages, free slots. Pure: no I/O, no lock, no clock.

The choice of a victim belongs to ``eviction``; bytes and journals belong to ``backends/slots``.
"""
