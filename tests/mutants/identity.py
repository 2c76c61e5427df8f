"""Seeded bugs in the identity of weights and in weight updates; see ``run.py``."""

from __future__ import annotations

EPOCHS = "flexkv_sglang/identity/epochs.py"
POOLS = "flexkv_sglang/pools/stores.py"
OF_POOLS = "tests/integration/test_weight_updates_of_pools.py"

MUTANTS = (
    (
        "a store opens inside a session of updates",
        EPOCHS,
        "return not (self.stale or self._changing or self._session)",
        "return not (self.stale or self._changing)",
        "tests/identity/test_epochs.py",
    ),
    (
        "old KV cache is stored under the new weights",
        EPOCHS,
        "self.stale = not (clean or self._flushed)",
        "self.stale = False",
        "tests/identity/test_epochs.py",
    ),
    (
        "a flush before the weights changed counts",
        EPOCHS,
        "self.stale, self._flushed = True, False",
        "self.stale = True",
        "tests/identity/test_epochs.py",
    ),
    (
        "changed weights keep their name",
        EPOCHS,
        'self.epoch = Epoch("", _nonce(), agreed=False)',
        'self.epoch = Epoch(self.epoch.content, "", agreed=False)',
        "tests/identity/test_epochs.py",
    ),
    (
        "an edit of one layer goes unseen",
        "flexkv_sglang/identity/fingerprint.py",
        "sorted({*_spread(size, per_file), *tensors.get(name, ())})",
        "sorted(_spread(size, per_file))",
        "tests/identity/test_fingerprint.py",
    ),
    (
        "arguments are read as they were given",
        "flexkv_sglang/integration/compat.py",
        "return None if record is None else resolved_view(record)",
        "return record",
        "tests/integration/test_served_model.py",
    ),
    (
        "all GGUF files of a directory are one model",
        "flexkv_sglang/integration/model_files.py",
        "return checkpoint(path.parent, only=path.name)",
        "return checkpoint(path.parent)",
        "tests/integration/test_served_model.py",
    ),
    (
        "the usual cache is looked at, not --download-dir",
        "flexkv_sglang/integration/model_files.py",
        "if path.is_dir() or not download_dir:",
        "if True:",
        "tests/integration/test_served_model.py",
    ),
    (
        "switches of the environment are no part of the namespace",
        "flexkv_sglang/integration/kv_settings.py",
        "if value != usual:",
        "if False:",
        "tests/integration/test_served_model.py",
    ),
    (
        "server arguments are no part of the namespace",
        "flexkv_sglang/identity/keys.py",
        "settings=dict(self.settings)",
        "settings={}",
        "tests/identity/test_keys.py",
    ),
    (
        "only KV gets the name of the new weights",
        POOLS,
        "for pool, spec in zip(pools, specs, strict=True):",
        "for pool, spec in zip(pools[:1], specs[:1], strict=True):",
        OF_POOLS,
    ),
    (
        "namespaces of new weights are opened under calls of before",
        POOLS,
        "if not alone or self._state.now is not State.PENDING:",
        "if self._state.now is not State.PENDING:",
        OF_POOLS,
    ),
    (
        "a pool that comes during an update is opened at once",
        "flexkv_sglang/pools/state.py",
        "Event.ADD: {State.OPEN: State.PENDING},",
        "Event.ADD: {State.OPEN: State.PENDING, State.SUSPENDED: State.PENDING},",
        OF_POOLS,
    ),
    (
        "files that were being opened for old weights are used for new ones",
        "flexkv_sglang/pools/pool.py",
        "return self.store is not None and self.opened_as == self.spec.identity",
        "return self.store is not None",
        OF_POOLS,
    ),
    (
        "files of weights that are gone stay",
        "flexkv_sglang/pools/suspended.py",
        "if identity.namespace in keep:",
        "if True:",
        OF_POOLS,
    ),
    (
        "opening one pool removes the files of the others",
        "backends/slots/retired.py",
        'noted(directory, "epoch") not in (None, "", keep)',
        'noted(directory, "epoch") not in (None, "")',
        OF_POOLS,
    ),
)
"""Fields of ``Mutant``."""
