"""Members: which other nodes there are and how their sets of pages change, through Redis or static peers.

The files with the sets themselves belong to ``replica``, messages between agents to ``wire``.
"""
