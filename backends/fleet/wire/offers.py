"""Packs the messages of one-sided engines (decision 018): OFFERED and DONE. OFFER is READ under another number.

Decoders are in wire_decode.py, layouts and limits in wire.py; docs/DATA_FILE.md lists every byte. Threads: any.
"""

from __future__ import annotations

from flexkv_sglang.backends.fleet.vocabulary import BATCH_PAGES, PROTOCOL
from flexkv_sglang.backends.fleet.wire.messages import (
    BLOB_BYTES_MAX,
    HOLD_MS_MAX,
    MAGIC,
    OFFERED_LAYOUT,
    OFFERED_PAGE_LAYOUT,
    RID_LAYOUT,
    Kind,
    Offered,
    OfferedPage,
    Read,
    pack_read,
)


def pack_offer(read: Read) -> list[bytes]:
    """Asks the server to hold these pages for the reader's engine."""
    return pack_read(read, Kind.OFFER)


def pack_offered(offered: Offered) -> list[bytes]:
    """Where the pages lie, and for how long."""
    assert len(offered.pages) <= BATCH_PAGES
    assert len(offered.blob) <= BLOB_BYTES_MAX
    assert offered.hold_ms <= HOLD_MS_MAX
    fixed = OFFERED_LAYOUT.pack(
        MAGIC, PROTOCOL, Kind.OFFERED, len(offered.pages), len(offered.blob), offered.hold_ms,
        offered.request_id, offered.hold,
    )  # fmt: skip
    return [fixed + b"".join(map(_page, offered.pages)) + offered.blob]


def _page(page: OfferedPage) -> bytes:
    return OFFERED_PAGE_LAYOUT.pack(
        page.status, page.kind, 0, page.length, page.checksum, page.address
    )


def pack_done(hold: int) -> list[bytes]:
    """Nobody reads from this hold any more."""
    return [RID_LAYOUT.pack(MAGIC, PROTOCOL, Kind.DONE, 0, hold)]
