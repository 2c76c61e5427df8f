"""Pages of other machines: the rank process's side (its remote tier and its agent's launcher), and the agent.

The wire, the membership and the replica that both sides use are ``backends.fleet``.
"""
