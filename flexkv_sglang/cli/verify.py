"""What is wrong with one owner: its generation, journal, slot file, keys and pages. Read-only.

An owner whose lock we do not hold may write while we look, so whatever looks wrong is looked at again:
a page counts as bad only if its record stands before and after it was read wrong, and the rest only if
a second look says the same.
"""

from __future__ import annotations

import time
import zlib
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from flexkv_sglang.backends.slots.journal import (
    LiveState,
    generations,
    journal_path,
    recover,
    slots_path,
)
from flexkv_sglang.backends.slots.records import (
    HEADER_BYTES,
    RECORD_BYTES,
    RecordOp,
    Records,
    SlotClass,
    valid_prefix,
)
from flexkv_sglang.cli.output import ProgressLine, counted
from flexkv_sglang.cli.page_reader import PageReader, Verdict
from flexkv_sglang.cli.scan import Namespace, Owner
from flexkv_sglang.errors import JournalError

_LOOKS = 3
_PAUSE_S = 0.2


@dataclass(slots=True)
class Damage:
    """``severity``: "problem" (exit code 1) or "note". ``what``: a stable word for tools."""

    severity: str
    what: str
    text: str
    repaired: bool = False


@dataclass(slots=True)
class Examined:
    """One owner. ``bad``: records of ``state`` to drop (positions). ``state`` is None if nothing is valid."""

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


def load(namespace: Namespace, owner: Owner) -> Examined:
    """The owner's state, or why there is none."""
    examined = Examined(namespace, owner)
    if not owner.locked:
        examined.note("problem", "no_lock", "files without a lock: nobody will adopt them")
    for _ in range(_LOOKS if owner.alive else 1):  # it may start a generation while we read
        try:
            examined.state = recover(owner.directory, owner.name, namespace.name)
        except JournalError as exc:
            reason = str(exc)
            time.sleep(_PAUSE_S if owner.alive else 0.0)
            continue
        examined.pages = len(examined.state.records)
        return examined
    if not generations(owner.directory, owner.name):
        examined.note(
            "note", "unfinished", "no journal: died while it was made; removed at a start"
        )
    else:
        examined.note("problem", "no_valid_journal", reason)
    return examined


def examine(examined: Examined, progress: ProgressLine, *, held: bool) -> None:
    """Fill in findings and bad pages. ``held``: we hold the owner's lock, so nothing changes under us."""
    if examined.state is None:
        return
    findings = _shape(examined)
    if findings and not held:
        time.sleep(_PAUSE_S)
        again = {item.text for item in _shape(examined)}
        findings = [item for item in findings if item.text in again]
    examined.findings += findings
    _doubles(examined)
    _pages(examined, progress, held=held)


def slot_class_of(state: LiveState) -> SlotClass:
    """The slot file of an owner: this release writes one."""
    return state.header.files[0]


def _shape(examined: Examined) -> list[Damage]:
    """Generations, journal tail, slot file size and leftovers, as they are now."""
    owner = examined.owner
    try:
        state = recover(owner.directory, owner.name, examined.namespace.name)
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


def _tail(owner: Owner, state: LiveState) -> list[Damage]:
    raw = journal_path(owner.directory, owner.name, state.header.generation).read_bytes()
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
    """Valid PUTs that name a file or slot that does not exist."""
    raw = journal_path(owner.directory, owner.name, state.header.generation).read_bytes()
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
        text = f"{path.name} has {size} bytes, not {wanted}: nobody can adopt it"
        return [Damage("problem", "short_slot_file", text)]
    if size > wanted:
        return [Damage("note", "long_slot_file", f"{path.name} has {size} bytes, not {wanted}")]
    return []


def _doubles(examined: Examined) -> None:
    """Of two slots with one key the older is waste."""
    assert examined.state is not None
    keys = examined.state.records["key"].tolist()
    last = {key: row for row, key in enumerate(keys)}
    if len(last) < len(keys):
        older = [row for row, key in enumerate(keys) if last[key] != row]
        examined.bad += older
        text = f"{len(older)} pages are stored in two slots"
        examined.note("problem", "double_keys", text)


def _pages(examined: Examined, progress: ProgressLine, *, held: bool) -> None:
    state = examined.state
    assert state is not None
    path = slots_path(
        examined.owner.directory, examined.owner.name, slot_class_of(state).slot_bytes
    )
    try:
        reader = PageReader(path, slot_class_of(state), examined.namespace.buffer_bytes)
    except OSError as exc:
        if len(state.records):
            examined.bad = list(range(len(state.records)))
            text = f"{len(state.records)} pages cannot be read: {exc.strerror}"
            examined.note("problem", "unreadable_pages", text)
        return
    with reader:
        verdicts = reader.verify(state.records, progress)
        if not held:
            _look_again(examined, reader, verdicts)
    _judge(examined, verdicts)


def _look_again(examined: Examined, reader: PageReader, verdicts: npt.NDArray[np.uint8]) -> None:
    """Clear what the owner rewrote meanwhile: a slot is rewritten only after its tombstone."""
    assert examined.state is not None
    records = examined.state.records
    for _ in range(_LOOKS):
        bad = np.flatnonzero((verdicts == Verdict.WRONG) | (verdicts == Verdict.UNREADABLE))
        if not len(bad):
            return
        still = _standing(examined.namespace.name, examined.owner, records[bad])
        verdicts[bad[~still]] = Verdict.RIGHT
        bad = bad[still]
        if len(bad):
            verdicts[bad] = reader.verify(records[bad])
            time.sleep(_PAUSE_S)


def _standing(namespace: str, owner: Owner, records: Records) -> npt.NDArray[np.bool_]:
    """Per record: does the journal still say the same?"""
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


def _judge(examined: Examined, verdicts: npt.NDArray[np.uint8]) -> None:
    assert examined.state is not None
    for verdict, what, text in (
        (Verdict.WRONG, "corrupt_pages", "with wrong bytes"),
        (Verdict.UNREADABLE, "unreadable_pages", "unreadable"),
    ):
        rows = np.flatnonzero(verdicts == verdict).tolist()
        if rows:
            examined.bad += rows
            first = examined.state.records[rows[0]]
            where = f"slot {int(first['slot'])}, key {first['key'].tobytes().hex()[:16]}..."
            examined.note("problem", what, f"{counted(len(rows), 'page')} {text} (first: {where})")
    examined.unproven = int((verdicts == Verdict.UNPROVEN).sum())


def whole_slots(path: Path, slot_class: SlotClass) -> int:
    """How many whole slots the file really has, at most ``slot_class.slot_count``."""
    return min(slot_class.slot_count, path.stat().st_size // slot_class.slot_bytes)
