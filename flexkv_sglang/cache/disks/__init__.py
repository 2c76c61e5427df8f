"""A tier's directories: the threads that may touch their files, and the watch over transfers. Duties that look after
one directory belong here; ``upkeep`` lists them. Nothing here knows the engine."""
