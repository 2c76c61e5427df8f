"""Pages of other machines: a rank process's side, the node's agent, and the run directory where they meet.

The wire, the membership and the sets of peers belong to ``backends/fleet``.
"""
