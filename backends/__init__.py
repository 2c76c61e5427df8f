"""Bytes outside of the process: on disks and in memory (``io``, ``slots``), and on other machines (``fleet``).

Knows nothing of SGLang, of models, or of eviction. Imported as ``flexkv_sglang.backends``, through a symlink.
"""
