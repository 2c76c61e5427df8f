"""The error tree. Only ``ConfigError`` ever leaves this package; the rest is counted and becomes a miss.

FlexKVError
    ConfigError              start-up only: the user can fix it
    TierError                the world failed; the engine counts it and answers "miss"
        TierUnavailableError     nothing could be tried
        PageCorruptError         length, key or checksum mismatch
    PeerError                another node, or the way to it; the same treatment
    JournalError             a journal or snapshot cannot be written or is not ours
    KernelArgumentError      a copy kernel was asked for what it cannot do; nothing was launched
"""


class FlexKVError(Exception):
    """Base of everything this package raises on purpose."""


class ConfigError(FlexKVError, ValueError):
    """A setting is wrong. Names the key, the value and what is valid.

    Also a ``ValueError``: SGLang prints those as "Failed to create storage backend: ...".
    """


class TierError(FlexKVError):
    """A storage medium failed in a way that concerns the whole call."""


class TierUnavailableError(TierError):
    """Nothing could be tried: file gone, ring broken, directory unreadable."""


class PageCorruptError(TierError):
    """Bytes on the medium are not the bytes that were committed."""


class PeerError(FlexKVError):
    """Another node did not answer in time, or not what was asked."""


class JournalError(FlexKVError):
    """A journal or snapshot cannot be written, or does not belong to us."""


class KernelArgumentError(FlexKVError, ValueError):
    """Shapes, dtypes, devices, strides or page ids that a kernel cannot take. Raised before any launch."""
