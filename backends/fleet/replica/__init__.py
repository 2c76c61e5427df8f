"""Sets of the pages of other nodes, in files that the agent writes and the rank processes map.

No network and no membership: ``members`` decides what the agent writes.
"""
