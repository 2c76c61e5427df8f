"""Other machines: protocol, transport, membership, replica."""
