"""Settings: the JSON that SGLang passes on, parsed once, strict and frozen."""
