"""Keys and identity: what must match for one process's page bytes to be right for another.

SGLang's page hash names the tokens of a prefix and nothing else: not the model, the dtype, the layout
or the shard. All of that goes into the ``Identity``; its digest is the *namespace*, the directory
pages live in. A mismatch is another directory, and so a miss, never wrong bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from flexkv_sglang.types import PageKey

FORMAT = 1
"""Version of the meaning of a page's bytes. Part of every identity."""

_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Identity:
    """Everything beside the tokens that decides a page's bytes.

    ``model`` stands for weights and configuration, ``settings`` for the server arguments that change KV
    cache; ``epoch`` is empty unless the weights were updated to something that has no name outside this
    server. ``layout`` is SGLang's host layout (byte order inside a page), ``geometry`` holds head counts and
    widths, ``buffer_bytes`` the sizes of the page's buffers in stored order. Shard fields are (rank, size)
    pairs; ``tp`` is (0, 1) for pools that all tensor-parallel ranks hold alike (MLA), and for pages that are
    cut into ``split_heads`` head groups (0: whole pages), whose geometry and buffers are those of a group. A
    data-parallel rank is never part of it: replicas share.
    """

    model: str
    settings: Mapping[str, str]
    pool: str
    pool_class: str
    dtype: str
    layout: str
    page_size: int
    buffer_bytes: tuple[int, ...]
    geometry: Mapping[str, int]
    first_layer: int
    layer_count: int
    tp: tuple[int, int]
    pp: tuple[int, int]
    attn_cp: tuple[int, int]
    dcp: tuple[int, int]
    split_heads: int
    storage_format_tag: str
    epoch: str = ""
    format: int = FORMAT

    def fields(self) -> dict[str, object]:
        """For NAMESPACE.json: people and tools read it."""
        return asdict(replace(self, settings=dict(self.settings), geometry=dict(self.geometry)))

    @property
    def namespace(self) -> str:
        """26 characters: base32 of a 128-bit BLAKE2b digest over all fields."""
        text = json.dumps(self.fields(), sort_keys=True).encode()
        digest = hashlib.blake2b(text, digest_size=16, person=b"flexkv-ns").digest()
        return base64.b32encode(digest).decode().rstrip("=").lower()

    @property
    def payload_bytes(self) -> int:
        """Bytes of one page."""
        return sum(self.buffer_bytes)


def page_key(text: str) -> PageKey:
    """SGLang's page hash as 32 bytes. A key that is not 64 hex digits is hashed: v0 keys are opaque text."""
    if len(text) == 2 * _KEY_BYTES:
        try:
            return PageKey(bytes.fromhex(text))
        except ValueError:
            pass
    return PageKey(hashlib.sha256(b"flexkv-key:" + text.encode()).digest())


def page_keys(texts: Sequence[str]) -> list[PageKey]:
    """``page_key`` of each."""
    return [page_key(text) for text in texts]
