"""``flexkv check``: verifies every owner under a directory; with ``--repair``, repairs the dead ones."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict
from pathlib import Path

from flexkv_sglang.backends.slots.ownership import OwnerLock
from flexkv_sglang.cli.output import ProgressLine, counted, emit, human_bytes, human_seconds, table
from flexkv_sglang.cli.repair import repair as repair_owner
from flexkv_sglang.cli.scan import Namespace, Owner, namespaces, unknown_entries
from flexkv_sglang.cli.verify import Damage, OwnerReport, load, verify
from flexkv_sglang.errors import JournalError


def run_check(root: Path, *, repair: bool, as_json: bool) -> int:
    """Returns the exit code: 1 if a problem remains."""
    found = namespaces(root)
    everything: list[OwnerReport] = []
    elsewhere = [
        Damage("note", "unknown_file", f"{name} is not ours") for name in unknown_entries(root)
    ]
    with ExitStack() as locks:
        held: set[tuple[Path, str]] = set()
        for namespace in found:
            elsewhere += _of_namespace(namespace)
            for owner in namespace.owners:
                if repair and _take(locks, owner):
                    held.add((owner.directory, owner.name))
                everything.append(load(namespace, owner))
        progress = ProgressLine(sum(item.pages for item in everything))
        for item in everything:
            mine = (item.owner.directory, item.owner.name) in held
            verify(item, progress, held=mine)
            if mine:
                _repair(item)
        progress.close()
    findings = [*elsewhere, *[finding for item in everything for finding in item.findings]]
    left = sum(finding.severity == "problem" and not finding.repaired for finding in findings)
    emit(
        _text(found, everything, elsewhere, progress.seconds, repair=repair),
        _fields(root, everything, elsewhere, left),
        as_json=as_json,
    )
    return 1 if left else 0


def _take(locks: ExitStack, owner: Owner) -> bool:
    lock = OwnerLock.try_take(owner.directory, owner.name) if owner.locked else None
    if lock is not None:
        locks.enter_context(lock)
    return lock is not None


def _repair(item: OwnerReport) -> None:
    if not item.findings:
        return
    try:
        repair_owner(item)
    except (JournalError, OSError) as exc:
        item.note("problem", "repair_failed", str(exc))


def _of_namespace(namespace: Namespace) -> list[Damage]:
    found = [
        Damage("note", "unknown_file", f"{namespace.name}/{name} is not ours")
        for name in namespace.unknown
    ]
    if not namespace.fields:
        text = f"{namespace.name}/NAMESPACE.json is missing or unreadable"
        found.append(Damage("note", "no_namespace_json", text))
    return found


def _text(
    found: list[Namespace],
    everything: list[OwnerReport],
    elsewhere: list[Damage],
    seconds: float,
    *,
    repair: bool,
) -> str:
    lines = []
    for namespace in found:
        lines.append(f"{namespace.name}  {namespace.fields.get('model', '')}".rstrip())
        mine = [item for item in everything if item.namespace is namespace]
        if mine:
            lines.append(
                table(
                    ("owner", "state", "generation", "pages", "bad", "unproven"),
                    [_row(item) for item in mine],
                )
            )
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
    return "\n".join(lines)


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
