"""The interface of a tier, the tier in slot files, and several tiers as one store.

Which page lies in which slot is ``index``; which page is evicted is ``eviction``. Files and bytes are ``backends``.
"""
