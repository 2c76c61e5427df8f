"""Bytes on media: slot files, journals, rings. Knows nothing of SGLang, of keys' meaning, or of eviction."""
