"""Commands on a directory of pages: check, stats, gc. They read every owner's files, and trust none of them.

Nothing here imports torch or SGLang.
"""
