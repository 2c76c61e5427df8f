"""The command ``flexkv``, for operators: check, stats, gc, doctor, nodes, agent, bench.

It reads files of tiers and run directories. Only ``bench`` and the child process of ``doctor`` import torch or SGLang.
"""
