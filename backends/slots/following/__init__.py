"""One neighbour's journal, followed by whoever does not own it. ``slots.neighbours`` joins all of them.
A thread that may hang reads the file; what it says is guarded by the store's lock."""
