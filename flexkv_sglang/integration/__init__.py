"""Everything that knows SGLang: plug-in, storage interface, hooks, releases."""
