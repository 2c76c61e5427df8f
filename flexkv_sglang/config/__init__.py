"""Settings: the JSON that SGLang passes on, parsed once, strict and frozen.

One parser per key, no I/O. No module reads settings from the environment.
"""
