"""Which leaf page gives up its slot. Pure."""
