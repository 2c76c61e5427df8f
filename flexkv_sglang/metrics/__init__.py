"""Metrics: the catalog of names, the counters of a storage instance, and their export to Prometheus.

No printing and no judging: ``flexkv stats`` and ``flexkv doctor`` are in ``cli``.
"""
