"""The command ``flexkv``: check, stats, gc. Knows files, not SGLang; imports neither torch nor sglang."""
