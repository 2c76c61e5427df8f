"""Which page is in which slot. Pure."""
