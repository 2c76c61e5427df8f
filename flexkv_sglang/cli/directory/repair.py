"""Repairs the files of one dead owner whose lock we hold: its journal, never its data.

Bad pages get a tombstone; the rest goes into a new generation, so that a neighbour that follows the journal notices.
Pages that cannot be proven right after a power loss (no full checksum, no clean end) are dropped as well.
"""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np

from flexkv_sglang.backends.checksum import ChecksumKind
from flexkv_sglang.backends.safe_files import open_own
from flexkv_sglang.backends.slots.journal import (
    JournalWriter,
    LiveState,
    boot_id,
    keys_field,
    new_records,
    slots_path,
    stats_path,
)
from flexkv_sglang.backends.slots.records import RecordOp, Records
from flexkv_sglang.cli.directory.verify import OwnerReport, slot_class_of, whole_slots
from flexkv_sglang.types import PageKey

_REWRITTEN = frozenset(
    {
        *("torn_tail", "bad_generation", "records_out_of_range", "short_slot_file", "double_keys"),
        *("corrupt_pages", "unreadable_pages", "stale_generation", "unproven_pages"),
    }
)
"""Findings that a new generation mends."""

_BY_HOLDING = ("temporary", "no_lock", "bad_stats")
"""Findings that are mended when we hold the lock and have removed temporaries and the stats file."""


def repair(report: OwnerReport) -> None:
    """Repair, and mark repaired findings. Raises ``JournalError`` or ``OSError`` when files cannot be written."""
    for path in report.owner.temporary:
        path.unlink(missing_ok=True)
    if any(finding.what == "bad_stats" for finding in report.findings):
        stats_path(report.owner.directory, report.owner.name).unlink(missing_ok=True)
    state = report.state
    rewritten = False
    if state is not None:
        _drop_unproven(report, state)
        if any(finding.what in _REWRITTEN for finding in report.findings):
            rewritten = _rewrite(report, state)
    for finding in report.findings:
        finding.repaired = finding.what in _BY_HOLDING or (rewritten and finding.what in _REWRITTEN)


def _drop_unproven(report: OwnerReport, state: LiveState) -> None:
    """Page-cache writes of an earlier boot are safe only after a clean end, or with a full checksum."""
    survived = state.clean or (bool(boot_id()) and state.header.boot_id == boot_id())
    kinds = state.records["flags"] & 0xFF
    rows = [] if survived else np.flatnonzero(kinds != ChecksumKind.XXH3_64).tolist()
    if rows:
        report.bad += rows
        text = f"{len(rows)} pages without a full checksum did not see a clean end of the machine"
        report.note("problem", "unproven_pages", text)


def _rewrite(report: OwnerReport, state: LiveState) -> bool:
    """Write the next generation without the bad pages. False if there is no usable slot file."""
    owner, slot_class = report.owner, slot_class_of(state)
    path = slots_path(owner.directory, owner.name, slot_class.slot_bytes)
    if len(state.header.files) != 1 or not path.exists() or not whole_slots(path, slot_class):
        return False
    wanted = replace(slot_class, slot_count=whole_slots(path, slot_class))
    drop = np.zeros(len(state.records), np.bool_)
    drop[report.bad] = True
    _, others = owner.generation_files(state.header.generation)
    for stale in others:
        stale.unlink(missing_ok=True)
    journal = JournalWriter(owner.directory, state.header, position=state.end, seq=state.seq)
    try:
        if drop.any():
            journal.append(_tombstones(state.records[drop]))
        journal.rotate(state.records[~drop], (wanted,))
        fd = open_own(path)
        try:
            os.fdatasync(fd)  # CLOSE says that data and journal are on the medium
        finally:
            os.close(fd)
    except BaseException:
        journal.close(clean=False)
        raise
    journal.close(clean=True)
    return True


def _tombstones(records: Records) -> Records:
    dels = new_records(RecordOp.DEL, len(records))
    dels["slot"] = records["slot"]
    dels["key"] = keys_field([PageKey(key) for key in records["key"].tolist()])
    return dels
