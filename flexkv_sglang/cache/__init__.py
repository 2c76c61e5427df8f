"""The tier in slot files, and several tiers as one store. The interface of a tier is ``flexkv_sglang.tier``.

Which page lies in which slot is ``index``; which page is evicted is ``eviction``. Files and bytes are ``backends``.
"""
