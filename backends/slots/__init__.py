"""This machine's pages: slot files, journals, owners and neighbours."""
