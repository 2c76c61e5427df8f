"""Verifies one owner: its generation, journal, slot file, keys and pages. Read-only.

An owner whose lock we do not hold may write meanwhile, so a suspected fault is looked at twice: a page is bad only if
its record stands before and after it was read wrong, every other fault only if a second look finds it again.
"""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flexkv_sglang.backends.safe_files import read_own
from flexkv_sglang.backends.slots.journal import (
    LiveState,
    generations,
    journal_path,
    recover,
    slots_path,
    stats_path,
)
from flexkv_sglang.backends.slots.records import (
    HEADER_BYTES,
    RECORD_BYTES,
    RecordOp,
    Records,
    SlotClass,
    valid_prefix,
)
from flexkv_sglang.cli.directory.page_reader import PageReader, Verdict
from flexkv_sglang.cli.directory.scan import Namespace, Owner
from flexkv_sglang.cli.directory.trusted_files import read_object, stats_of
from flexkv_sglang.cli.output import ProgressLine, counted
from flexkv_sglang.errors import JournalError

_LOOKS = 3
_PAUSE_S = 0.2
_JOURNAL_BYTES_MAX = 1 << 36


@dataclass(slots=True)
class Damage:
    """One finding. ``severity``: "problem" (exit code 1) or "note". ``what``: a stable word for tools."""

    severity: str
    what: str
    text: str
    repaired: bool = False


@dataclass(slots=True)
class OwnerReport:
    """The findings of one owner. ``bad``: positions of records in ``state`` to drop. ``state``: None if invalid."""

    namespace: Namespace
    owner: Owner
    state: LiveState | None = None
    findings: list[Damage] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)
    pages: int = 0
    unproven: int = 0

    def note(self, severity: str, what: str, text: str) -> None:
        """Add a finding."""
        self.findings.append(Damage(severity, what, text))


def load(namespace: Namespace, owner: Owner) -> OwnerReport:
    """Read the owner's state; the report has a finding if there is none."""
    report = OwnerReport(namespace, owner)
    for reason in owner.foreign:
        report.note("problem", "foreign_file", f"{reason}: not opened")
    if owner.foreign:
        return report
    if not owner.locked:
        report.note("problem", "no_lock", _without_lock(owner))
    stats = stats_path(owner.directory, owner.name)
    if stats in owner.files and not stats_of(read_object(stats)):
        report.note(
            "problem", "bad_stats", f"{stats.name} makes no sense: its figures are not shown"
        )
    reason = ""
    for _ in range(_LOOKS if owner.alive else 1):  # it may start a generation while we read
        try:
            report.state = recover(owner.directory, owner.name, namespace.name)
        except JournalError as exc:
            reason = str(exc)
            time.sleep(_PAUSE_S if owner.alive else 0.0)
            continue
        report.pages = len(report.state.records)
        return report
    if not generations(owner.directory, owner.name):
        report.note(
            "note",
            "unfinished",
            "no journal: its process died while it made it; a start removes it",
        )
    else:
        report.note("problem", "no_valid_journal", reason)
    return report


def _without_lock(owner: Owner) -> str:
    if owner.alive:
        return (
            "its lock file was removed, and a process may write its files (or this file system cannot tell): "
            "while it lives no server shares its pages"
        )
    return "files without a lock: no server adopts them. check --repair makes it again, gc removes them"


def verify(report: OwnerReport, progress: ProgressLine, *, held: bool) -> None:
    """Add findings and bad pages. ``held``: we hold the owner's lock, so its files do not change meanwhile."""
    if report.state is None:
        return
    findings = _shape(report)
    if findings and not held:
        time.sleep(_PAUSE_S)
        again = {item.text for item in _shape(report)}
        findings = [item for item in findings if item.text in again]
    report.findings += findings
    _doubles(report)
    _pages(report, progress, held=held)


def slot_class_of(state: LiveState) -> SlotClass:
    """The slot file of an owner: this release writes one per owner."""
    return state.header.files[0]


def _shape(report: OwnerReport) -> list[Damage]:
    """Findings about generations, journal tail, slot file size and leftovers, as they are now."""
    owner = report.owner
    try:
        state = recover(owner.directory, owner.name, report.namespace.name)
        found = [*_tail(owner, state), *_dropped(owner, state), *_slot_file(owner, state)]
    except (JournalError, OSError) as exc:
        return [Damage("problem", "unstable", f"cannot be read again: {exc}")]
    newest = max(generations(owner.directory, owner.name), default=0)
    if newest > state.header.generation:
        text = f"generation {newest} is not valid; {state.header.generation} is used"
        found.append(Damage("problem", "bad_generation", text))
    _, stale = owner.generation_files(state.header.generation)
    if names := [path.name for path in stale if path.exists()]:
        found.append(Damage("note", "stale_generation", f"left over: {', '.join(names)}"))
    if names := [path.name for path in owner.temporary if path.exists() and not owner.alive]:
        found.append(Damage("note", "temporary", f"left over: {', '.join(names)}"))
    return found


def _journal(owner: Owner, state: LiveState) -> bytes:
    """All of it; ``recover`` has refused one that is too long. Raises ``OSError``."""
    path = journal_path(owner.directory, owner.name, state.header.generation)
    return read_own(path, _JOURNAL_BYTES_MAX)


def _tail(owner: Owner, state: LiveState) -> list[Damage]:
    raw = _journal(owner, state)
    rest = raw[state.end :]
    rest = rest[len(valid_prefix(rest, state.header.crc_seed, state.seq)) * RECORD_BYTES :]
    if not rest:
        return []
    whole = sum(
        zlib.crc32(rest[at + 4 : at + RECORD_BYTES], state.header.crc_seed & 0xFFFFFFFF)
        == int.from_bytes(rest[at : at + 4], "little")
        for at in range(0, len(rest) - RECORD_BYTES + 1, RECORD_BYTES)
    )
    text = f"{len(rest)} bytes at the end of the journal are no valid records"
    if whole:
        text += f"; {whole} whole records behind the first wrong one are lost"
    return [Damage("problem", "torn_tail", text)]


def _dropped(owner: Owner, state: LiveState) -> list[Damage]:
    """Finds valid PUTs of a file or slot that does not exist."""
    raw = _journal(owner, state)
    records = valid_prefix(
        raw[HEADER_BYTES : state.end], state.header.crc_seed, state.header.base_seq
    )
    puts = records[records["op"] == RecordOp.PUT]
    outside = (puts["file"] > 0) | (puts["slot"] >= slot_class_of(state).slot_count)
    count = int(outside.sum())
    text = f"{count} records name slots that do not exist; they are ignored"
    return [Damage("problem", "records_out_of_range", text)] if count else []


def _slot_file(owner: Owner, state: LiveState) -> list[Damage]:
    slot_class = slot_class_of(state)
    if len(state.header.files) != 1:
        text = f"{len(state.header.files)} slot files; this release knows owners with one"
        return [Damage("problem", "slot_files", text)]
    path = slots_path(owner.directory, owner.name, slot_class.slot_bytes)
    wanted = slot_class.slot_bytes * slot_class.slot_count
    try:
        size = path.stat().st_size
    except FileNotFoundError:
        return [Damage("problem", "no_slot_file", f"{path.name} is missing")]
    if size < wanted:
        text = f"{path.name} has {size} bytes, not {wanted}: no server can adopt it"
        return [Damage("problem", "short_slot_file", text)]
    if size > wanted:
        return [Damage("note", "long_slot_file", f"{path.name} has {size} bytes, not {wanted}")]
    return []


def _doubles(report: OwnerReport) -> None:
    """Find keys in two slots: the older slot is waste."""
    assert report.state is not None
    keys = report.state.records["key"].tolist()
    last = {key: row for row, key in enumerate(keys)}
    if len(last) < len(keys):
        older = [row for row, key in enumerate(keys) if last[key] != row]
        report.bad += older
        text = f"{len(older)} pages are stored in two slots"
        report.note("problem", "double_keys", text)


def _pages(report: OwnerReport, progress: ProgressLine, *, held: bool) -> None:
    state = report.state
    assert state is not None
    path = slots_path(report.owner.directory, report.owner.name, slot_class_of(state).slot_bytes)
    try:
        reader = PageReader(path, slot_class_of(state), report.namespace.buffer_bytes)
    except OSError as exc:
        if len(state.records):
            report.bad = list(range(len(state.records)))
            text = f"{len(state.records)} pages cannot be read: {exc.strerror}"
            report.note("problem", "unreadable_pages", text)
        return
    with reader:
        verdicts = reader.verify(state.records, progress)
        if not held:
            _look_again(report, reader, verdicts)
    _judge(report, verdicts)


def _look_again(report: OwnerReport, reader: PageReader, verdicts: npt.NDArray[np.uint8]) -> None:
    """Clear slots that the owner rewrote meanwhile: a slot is rewritten only after its tombstone."""
    assert report.state is not None
    records = report.state.records
    for _ in range(_LOOKS):
        bad = np.flatnonzero((verdicts == Verdict.WRONG) | (verdicts == Verdict.UNREADABLE))
        if not len(bad):
            return
        still = _standing(report.namespace.name, report.owner, records[bad])
        verdicts[bad[~still]] = Verdict.RIGHT
        bad = bad[still]
        if len(bad):
            verdicts[bad] = reader.verify(records[bad])
            time.sleep(_PAUSE_S)


def _standing(namespace: str, owner: Owner, records: Records) -> npt.NDArray[np.bool_]:
    """Per record: True if the journal still has it."""
    try:
        state = recover(owner.directory, owner.name, namespace)
    except (JournalError, OSError):
        return np.zeros(len(records), np.bool_)
    now = set(_identities(state.records))
    return np.array([item in now for item in _identities(records)], np.bool_)


def _identities(records: Records) -> list[tuple[int, int, bytes]]:
    return list(
        zip(records["slot"].tolist(), records["sum"].tolist(), records["key"].tolist(), strict=True)
    )


def _judge(report: OwnerReport, verdicts: npt.NDArray[np.uint8]) -> None:
    assert report.state is not None
    for verdict, what, text in (
        (Verdict.WRONG, "corrupt_pages", "with wrong bytes"),
        (Verdict.UNREADABLE, "unreadable_pages", "unreadable"),
    ):
        rows = np.flatnonzero(verdicts == verdict).tolist()
        if rows:
            report.bad += rows
            first = report.state.records[rows[0]]
            where = f"slot {int(first['slot'])}, key {first['key'].tobytes().hex()[:16]}..."
            report.note("problem", what, f"{counted(len(rows), 'page')} {text} (first: {where})")
    report.unproven = int((verdicts == Verdict.UNPROVEN).sum())


def whole_slots(path: Path, slot_class: SlotClass) -> int:
    """Number of whole slots in the file, at most ``slot_class.slot_count``."""
    return min(slot_class.slot_count, path.stat().st_size // slot_class.slot_bytes)
