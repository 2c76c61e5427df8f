"""Seeded bugs in what names the weights and in what happens when they change; see ``mutants.py``."""

from __future__ import annotations

EPOCHS = "flexkv_sglang/epochs.py"

IDENTITY = (
    (
        "a store opens inside a session of updates",
        EPOCHS,
        "return not (self.stale or self._changing or self._session)",
        "return not (self.stale or self._changing)",
        "tests/test_epochs.py",
    ),
    (
        "old KV cache is stored under the new weights",
        EPOCHS,
        "self.stale = not (clean or self._flushed)",
        "self.stale = False",
        "tests/test_epochs.py",
    ),
    (
        "a flush before the weights changed counts",
        EPOCHS,
        "self.stale, self._flushed = True, False",
        "self.stale = True",
        "tests/test_epochs.py",
    ),
    (
        "changed weights keep their name",
        EPOCHS,
        'self.epoch = Epoch("", _nonce(), agreed=False)',
        'self.epoch = Epoch(self.epoch.content, "", agreed=False)',
        "tests/test_epochs.py",
    ),
    (
        "an edit of one layer goes unseen",
        "flexkv_sglang/fingerprint.py",
        "sorted({*_spread(size, per_file), *tensors.get(name, ())})",
        "sorted(_spread(size, per_file))",
        "tests/test_fingerprint.py",
    ),
    (
        "server arguments are no part of the namespace",
        "flexkv_sglang/keys.py",
        "settings=dict(self.settings)",
        "settings={}",
        "tests/test_keys.py",
    ),
)
"""Fields of ``Mutant``."""
