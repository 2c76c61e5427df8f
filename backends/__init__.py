"""Bytes outside of the process: on disks and in memory (``io``, ``slots``), and on other machines (``fleet``).

Single modules, for all three: ``checksum``, ``failpoints``, ``file_lock``, ``memory``, ``safe_files``. Knows nothing of
SGLang, of models, or of eviction. Imported as ``flexkv_sglang.backends``, through a symlink.
"""
