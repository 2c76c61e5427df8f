"""``flexkv check``: verifies every owner under a directory; with ``--repair``, repairs the dead ones."""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

from flexkv_sglang.cli.directory.dead_owner import take
from flexkv_sglang.cli.directory.repair import repair as repair_owner
from flexkv_sglang.cli.directory.scan import Namespace, Owner, Scan, said, scan
from flexkv_sglang.cli.directory.verify import Damage, OwnerReport, load, verify
from flexkv_sglang.cli.output import ProgressLine, counted, emit, human_bytes, human_seconds, table


def run_check(root: Path, *, repair: bool, as_json: bool) -> int:
    """Returns the exit code: 1 if a problem remains. Raises ``OSError`` if ``root`` cannot be read."""
    found = scan(root)
    if repair and _close_to_others(found):
        found = scan(root)
    everything: list[OwnerReport] = []
    elsewhere = _of_root(found)
    for namespace in found.namespaces:
        elsewhere += _of_namespace(namespace, repair=repair)
        everything += [_load(namespace, owner) for owner in namespace.owners]
    progress = ProgressLine(sum(item.pages for item in everything))
    everything = [_judged(item, progress, repair=repair) for item in everything]
    progress.close()
    findings = [*elsewhere, *[finding for item in everything for finding in item.findings]]
    left = sum(finding.severity == "problem" and not finding.repaired for finding in findings)
    emit(
        _lines(found, everything, elsewhere, progress.seconds, repair=repair),
        _fields(root, everything, elsewhere, left),
        as_json=as_json,
    )
    return 1 if left else 0


def _close_to_others(found: Scan) -> bool:
    """Take the rights of others from our folders, so that nothing can be planted meanwhile. True if any had some."""
    open_ones = [item for item in found.namespaces if item.shared and not item.not_to_change]
    for namespace in open_ones:
        with suppress(OSError), namespace.acting():
            os.chmod(namespace.directory, 0o700)
    return bool(open_ones)


def _load(namespace: Namespace, owner: Owner) -> OwnerReport:
    try:
        with namespace.acting():
            return load(namespace, owner)
    except Exception as exc:  # noqa: BLE001 - one damaged owner must not hide the others
        report = OwnerReport(namespace, owner)
        report.note("problem", "unreadable_owner", said(exc))
        return report


def _judged(item: OwnerReport, progress: ProgressLine, *, repair: bool) -> OwnerReport:
    """Verify; with ``repair``, repair a dead owner under its lock, which is held for just so long."""
    lock = None
    try:
        with item.namespace.acting():
            if repair and not item.namespace.not_to_change:
                lock = take(item.owner)
            if lock is None:
                verify(item, progress, held=False)
                return item
            with lock:
                item = load(item.namespace, item.owner)  # it may have changed before we held it
                verify(item, progress, held=True)
                if item.findings:
                    repair_owner(item)
    except Exception as exc:  # noqa: BLE001 - one damaged owner must not hide the others
        item.note("problem", "unreadable_owner" if lock is None else "repair_failed", said(exc))
    return item


def _of_root(found: Scan) -> list[Damage]:
    """Folders of other users are problems only if there is nothing else."""
    return [
        Damage(
            "problem" if item.ours or not found.namespaces else "note",
            "refused_folder",
            f"{item.path} {item.reason}",
        )
        for item in found.refused
    ] + [Damage("note", "unknown_file", f"{name} is not ours") for name in found.unknown]


def _of_namespace(namespace: Namespace, *, repair: bool) -> list[Damage]:
    found = [
        Damage("note", "unknown_file", f"{namespace.name}/{name} is not ours")
        for name in namespace.unknown
    ]
    if not namespace.fields:
        text = f"{namespace.name}/NAMESPACE.json is missing or unreadable"
        bad = os.path.lexists(namespace.directory / "NAMESPACE.json")
        found.append(Damage("problem" if bad else "note", "no_namespace_json", text))
    if namespace.remedy:
        found.append(Damage("note", "foreign_remedy", namespace.remedy))
    if repair and (reason := namespace.not_to_change):
        found.append(
            Damage("note", "not_changed", f"{namespace.name}: {reason}: nothing is repaired")
        )
    if not repair and namespace.shared:
        text = (
            f"{namespace.name}: others can write to the folder; --repair takes that right from them"
        )
        found.append(Damage("note", "shared_folder", text))
    return found


def _lines(
    found: Scan,
    everything: list[OwnerReport],
    elsewhere: list[Damage],
    seconds: float,
    *,
    repair: bool,
) -> list[str]:
    lines = []
    for namespace in found.namespaces:
        lines.append(f"{namespace.name}  {namespace.fields.get('model', '')}".rstrip())
        mine = [item for item in everything if item.namespace is namespace]
        if mine:
            head = ("owner", "state", "generation", "pages", "bad", "unproven")
            lines += table(head, [_row(item) for item in mine])
        for item in mine:
            lines += [f"  {item.owner.name}: {_line(f)}" for f in item.findings]
            if repair and item.owner.alive and item.findings:
                lines.append(f"  {item.owner.name}: a live process holds it: not repaired")
    lines += [_line(finding) for finding in elsewhere]
    findings = [*elsewhere, *[finding for item in everything for finding in item.findings]]
    problems = [finding for finding in findings if finding.severity == "problem"]
    repaired = sum(finding.repaired for finding in problems)
    size = sum(_payload(item) * item.pages for item in everything)
    pages = sum(item.pages for item in everything)
    lines.append(
        f"{counted(len(everything), 'owner')}, {counted(pages, 'page')}, {human_bytes(size)} "
        f"in {human_seconds(seconds)}: {counted(len(problems), 'problem')}"
        + (f", {repaired} repaired" if repair else "")
        + f", {counted(len(findings) - len(problems), 'note')}"
    )
    return lines


def _row(item: OwnerReport) -> tuple[object, ...]:
    generation = "-" if item.state is None else item.state.header.generation
    return (
        item.owner.name,
        "alive" if item.owner.alive else "dead",
        generation,
        item.pages,
        len(set(item.bad)),
        item.unproven,
    )


def _line(finding: Damage) -> str:
    return f"{'repaired' if finding.repaired else finding.severity}: {finding.text}"


def _payload(item: OwnerReport) -> int:
    return item.state.header.files[0].payload_bytes if item.state is not None else 0


def _fields(
    root: Path, everything: list[OwnerReport], elsewhere: list[Damage], left: int
) -> dict[str, object]:
    owners = [
        {
            "namespace": item.namespace.name,
            "owner": item.owner.name,
            "alive": item.owner.alive,
            "pages": item.pages,
            "bad_pages": len(set(item.bad)),
            "unproven_pages": item.unproven,
            "findings": [asdict(finding) for finding in item.findings],
        }
        for item in everything
    ]
    return {
        "directory": str(root),
        "owners": owners,
        "findings": [asdict(finding) for finding in elsewhere],
        "problems_left": left,
    }
