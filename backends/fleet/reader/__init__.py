"""A rank process reads pages of other nodes."""
