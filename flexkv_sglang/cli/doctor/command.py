"""``flexkv doctor``: gathers facts, tries every cause of zero hits, and prints the likeliest first."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path

from flexkv_sglang.cli.doctor import files, setup, sharing, traffic
from flexkv_sglang.cli.doctor.facts import Facts, gather
from flexkv_sglang.cli.doctor.server import Server, ask_server
from flexkv_sglang.cli.doctor.setup import Finding
from flexkv_sglang.cli.output import counted, emit, human_bytes
from flexkv_sglang.config.settings import TierConfig

CAUSES: tuple[Callable[[Facts], Finding | None], ...] = (
    setup.plugin,
    setup.salts,
    setup.unreachable,
    setup.not_attached,
    setup.other_path,
    setup.no_directory,
    files.hung_directory,
    files.read_only,
    setup.no_access,
    files.foreign_files,
    setup.breaker,
    setup.disk_full,
    files.dead_files,
    traffic.nothing_written,
    traffic.nothing_asked,
    traffic.hybrid_pool,
    traffic.other_namespace,
    traffic.verify_level,
    traffic.corrupt,
    traffic.late,
    traffic.failures,
    traffic.too_small,
    sharing.no_agent,
    sharing.agent_silent,
    sharing.agent_differs,
    sharing.agent_unfit,
    sharing.loopback_only,
    sharing.redis_down,
    sharing.peer_unreachable,
    sharing.no_other_node,
    sharing.no_common_namespace,
    sharing.peer_breaker,
    traffic.unused_hits,
    traffic.served_above,
    traffic.prompts_differ,
    setup.network,
    setup.not_running,
    setup.slow_io,
)
"""In the order of the report: faults that stop all pages, then some pages, then faults that may be harmless."""

_EXPLAINED_BY = {
    "nothing_asked": {"nothing_written", "served_above"},
    "not_running": {
        "server_unreachable",
        "not_attached",
        "other_path",
        "no_directory",
        "no_access",
        "hung_directory",
    },
    "no_access": {"read_only"},
    "prompts_differ": {
        "nothing_asked",
        "nothing_written",
        "breaker_open",
        "hybrid_pool",
        "verify_level",
        "too_small",
        "served_above",
    },
    "served_above": {"nothing_written"},
    "failures": {"breaker_open"},
    "no_other_node": {"peer_unreachable"},
}
"""A finding -> more precise findings: it is left out when one of these is there."""


def run_doctor(directory: Path | None, url: str | None, *, as_json: bool) -> int:
    """Returns the exit code: 1 if a cause was found."""
    server = ask_server(url) if url is not None else None
    facts = gather(_paths(directory, server), server, None, time.time())
    findings = diagnose(facts)
    emit(_lines(facts, findings), _fields(facts, findings), as_json=as_json)
    return 1 if any(finding.severity == "cause" for finding in findings) else 0


def diagnose(facts: Facts) -> list[Finding]:
    """Causes first, then notes, each in the order of ``CAUSES``. Pure."""
    found: dict[str, Finding] = {}
    for cause in CAUSES:
        finding = _judged(cause, facts)
        if finding is not None:
            found.setdefault(finding.what, finding)
    kept = [
        item
        for item in found.values()
        if not any(
            other in found and found[other].severity == "cause"
            for other in _EXPLAINED_BY.get(item.what, ())
        )
    ]
    return sorted(kept, key=lambda item: item.severity == "note")


def _judged(cause: Callable[[Facts], Finding | None], facts: Facts) -> Finding | None:
    try:
        return cause(facts)
    except (LookupError, TypeError, ValueError, ArithmeticError, AttributeError) as exc:
        name = cause.__name__
        return Finding(
            "unsure",
            "One cause could not be judged",
            f"{name}: {type(exc).__name__}: {exc}",
            "A file here has contents that make no sense: flexkv check names most of them",
            "note",
        )


def _paths(directory: Path | None, server: Server | None) -> list[Path]:
    """The named directory, else the server's, else the default one."""
    if directory is not None:
        return [directory]
    config = server.config if server is not None else None
    tiers = config.tiers if config is not None else (TierConfig(),)
    return [Path(path) for tier in tiers for path in tier.path]


def _lines(facts: Facts, findings: Sequence[Finding]) -> list[str]:
    lines = [_summary(facts)]
    chosen = [item for item in findings if item.severity == "cause"]
    for number, item in enumerate(chosen, 1):
        lines += [f"{number}. {item.title} [{item.what}]", f"   seen: {item.evidence}"]
        lines.append(f"   do:   {item.remedy}")
    if not chosen:
        lines.append("Nothing is wrong.")
    for item in findings:
        if item.severity == "note":
            lines.append(f"note: {item.title} [{item.what}]: {item.evidence}. {item.remedy}")
    return [*lines, *_looked_at(facts)]


def _summary(facts: Facts) -> str:
    rate = facts.hit_rate
    hits = "nothing asked yet" if rate is None else f"{100 * rate:.1f} %"
    alive = sum(item.owner.alive for group in facts.groups for item in group.owners)
    return (
        f"hit rate {hits} ({facts.count('found_pages')} of {facts.count('asked_pages')} pages asked for), "
        f"{counted(facts.pages, 'KV page')} stored, {counted(alive, 'owner')} alive"
    )


def _looked_at(facts: Facts) -> list[str]:
    """Lists the places that were looked at, so that a wrong one is noticed."""
    lines = []
    for place in facts.places:
        disk = place.disk
        text = "not looked at"
        if disk is not None:
            mode = disk.mode
            how = f"{mode.engine}, o_direct {str(mode.o_direct).lower()}" if mode else disk.trouble
            text = (
                f"{counted(len(place.groups), 'namespace')}, {disk.file_system or 'unknown file system'}, "
                f"{human_bytes(disk.free_bytes)} of {human_bytes(disk.total_bytes)} free, {how}"
            )
        lines.append(f"looked at {place.path}: {text}")
    for fleet in facts.fleets:
        agent = "no agent" if fleet.agent is None else f"agent {fleet.agent.get('pid')}"
        lines.append(
            f"looked at {fleet.run_dir}: {agent}, {counted(len(fleet.peers_up), 'other node')} alive"
        )
    server, plugin, machine = facts.server, facts.plugin, facts.machine
    if server is not None and not server.error:
        metrics = "with metrics" if server.metrics else "without metrics (--enable-metrics)"
        lines.append(f"looked at {server.url}: SGLang {server.flags.get('version')}, {metrics}")
    if plugin.sglang is not None:
        lines.append(f"SGLang {plugin.sglang} here, plug-in {_plugin_state(facts)}")
    elif not facts.alive and not any(place.trouble for place in facts.places):
        lines.append("SGLang is not installed in this environment: the plug-in was not looked at")
    limit = "no limit" if machine.memlock is None else human_bytes(machine.memlock)
    lines.append(
        f"huge pages: {machine.huge_pages_free} of {machine.huge_pages} free, transparent: {machine.transparent}; "
        f"locked memory of {machine.of}: {limit}"
    )
    return lines


def _plugin_state(facts: Facts) -> str:
    plugin = facts.plugin
    if plugin.error or plugin.misfit:
        return f"does not fit: {plugin.error or plugin.misfit}"
    if not plugin.entry_point:
        return "not installed"
    return "fits" if plugin.listed else f"kept out by SGLANG_PLUGINS={plugin.allowed!r}"


def _fields(facts: Facts, findings: Sequence[Finding]) -> dict[str, object]:
    server = facts.server
    return {
        "directories": [str(place.path) for place in facts.places],
        "hit_rate": facts.hit_rate,
        "asked_pages": facts.count("asked_pages"),
        "found_pages": facts.count("found_pages"),
        "pages": facts.pages,
        "alive": facts.alive,
        "findings": [asdict(item) for item in findings],
        "plugin": asdict(facts.plugin),
        "machine": asdict(facts.machine),
        "disks": {str(p.path): asdict(p.disk) for p in facts.places if p.disk is not None},
        "sharing": [asdict(fleet) for fleet in facts.fleets],
        "server": None if server is None else {"url": server.url, "flags": dict(server.flags)},
    }
