"""Measures this package beside its peers on the user's own disk; see ``ssd``."""
