"""Seeded bugs in what names a page beside its tokens, for ``run.py``: fields of ``Mutant``."""

from __future__ import annotations

SETTINGS = "flexkv_sglang/integration/kv_settings.py"
TABLE = "tests/integration/test_mutation_table.py"

MUTANTS = (
    (
        "files that an argument names are looked at again at each attach",
        SETTINGS,
        "    if (name, value) not in _started_with:",
        "    if True:",
        TABLE,
    ),
    (
        "adapters are looked at again at each attach",
        SETTINGS,
        "    if (argument, path) not in _started_with:",
        "    if True:",
        TABLE,
    ),
)
