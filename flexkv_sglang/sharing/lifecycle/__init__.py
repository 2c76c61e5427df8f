"""The life of an agent: whether it fits, how another takes its place, what it says.

``agent_launcher`` decides, for a rank process; ``agent`` is the process itself.
"""
