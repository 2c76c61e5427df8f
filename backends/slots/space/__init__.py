"""Space for slot files: the owners that take it, the dead ones that make room, allocation, and the limit of memory.

Nothing here knows pages or journals beyond their headers."""
