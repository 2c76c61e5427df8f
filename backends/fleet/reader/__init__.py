"""A rank process reads pages of other nodes: connections, breakers, verification.

``sharing`` decides which pages to read.
"""
