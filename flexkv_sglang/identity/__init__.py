"""What must match for a page to be right: page keys, namespaces, weights."""
