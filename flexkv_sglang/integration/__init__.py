"""Everything that knows SGLang's storage side: plug-in, storage interface, hooks, differences between releases.

The linker has a folder of its own; pools, cache and sharing do not import SGLang.
"""
