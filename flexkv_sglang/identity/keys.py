"""Identity of a process's pages, and page keys. Pages of another process are right only if the identities match.

SGLang's page hash covers the tokens of a prefix only: not the model, the dtype, the layout or the shard. All of
these go into the ``Identity``. Its digest is the *namespace*, the name of the directory with the pages. A mismatch
is another directory, and so a miss, never wrong bytes.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace

from flexkv_sglang.types import PageKey

FORMAT = 1
"""Version of the format of a page's bytes; part of every identity."""

_KEY_BYTES = 32


@dataclass(frozen=True, slots=True)
class Identity:
    """Everything beside the tokens that decides a page's bytes.

    ``model`` identifies weights and configuration, ``settings`` the server arguments that change KV cache; ``epoch``
    is empty unless a weight update left weights without a fingerprint. ``layout`` is SGLang's host layout (byte order
    inside a page), ``geometry`` has head counts and widths, ``buffer_bytes`` the sizes of the page's buffers in stored
    order. Shard fields are (rank, size) pairs. ``tp`` is (0, 1) for pools that are the same on all tensor-parallel
    ranks (MLA), and for pages that are cut into ``split_heads`` head groups (0: whole pages): then geometry and
    buffers are those of a group. A data-parallel rank is never part of it: replicas share.
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
        """Return all fields, for NAMESPACE.json."""
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
    """Convert SGLang's page hash to 32 bytes. Other text than 64 lower-case hex digits (v0 keys) is hashed."""
    if len(text) == 2 * _KEY_BYTES:
        try:
            key = bytes.fromhex(text)  # it also reads capitals, and skips blanks
        except ValueError:
            key = b""
        if key.hex() == text:
            return PageKey(key)
    return PageKey(hashlib.sha256(b"flexkv-key:" + text.encode(errors="surrogatepass")).digest())


def page_keys(texts: Sequence[str]) -> list[PageKey]:
    """Convert each text with ``page_key``."""
    return [page_key(text) for text in texts]
