"""The error tree. Only ``ConfigError`` leaves this package; any other error is counted and becomes a miss.

FlexKVError
    ConfigError              start-up only: the user can fix it
    TierError                a storage medium failed: counted, and answered as a miss
        TierUnavailableError     no I/O was tried
    PeerError                another node or the network failed: the same
    JournalError             a journal or snapshot cannot be written, or is not ours
    KernelArgumentError      a copy kernel cannot take its arguments; it was not launched
"""

from __future__ import annotations

from flexkv_sglang.printable import printable


class FlexKVError(Exception):
    """Base of all errors that this package raises."""


class ConfigError(FlexKVError, ValueError):
    """A setting is wrong. Its text names the key, the value and the valid choices.

    Also a ``ValueError``: SGLang prints those as "Failed to create storage backend: ...". One line, without control
    characters and passwords of URLs, whatever the value was.
    """

    def __init__(self, text: str) -> None:
        super().__init__(printable(text))


class TierError(FlexKVError):
    """A storage medium failed in a way that concerns the whole call."""


class TierUnavailableError(TierError):
    """No I/O was tried: the file is gone, the ring is broken, the directory is unreadable."""


class PeerError(FlexKVError):
    """Another node did not answer in time, or gave a wrong answer."""


class JournalError(FlexKVError):
    """A journal or snapshot cannot be written, or does not belong to us."""


class KernelArgumentError(FlexKVError, ValueError):
    """A kernel cannot take these shapes, dtypes, devices, strides or page ids. Raised before any launch."""
