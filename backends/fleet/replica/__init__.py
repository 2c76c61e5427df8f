"""What other nodes hold, in mapped files."""
