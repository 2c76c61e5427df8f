"""The agent serves pages to other nodes."""
