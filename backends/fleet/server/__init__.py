"""The agent serves pages and changes of its node to other nodes.

No disk and no index here: a ``ServedNode`` has them.
"""
