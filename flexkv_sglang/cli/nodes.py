"""``flexkv nodes``: lists the nodes that this one shares pages with, as its agent sees them."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from flexkv_sglang.cli.directory.scan import said
from flexkv_sglang.cli.directory.trusted_files import refuse_irregular
from flexkv_sglang.cli.output import emit, table
from flexkv_sglang.sharing.run_dir import RunDir

_STALE_S = 5.0


def run_nodes(run_path: Path | None, *, as_json: bool) -> int:
    """Exit code 0 if every agent of this user lives and all its feeds are connected, 1 otherwise."""
    run_dirs = [RunDir(run_path)] if run_path else RunDir.all_of_user()
    found = []
    lines = []
    for run_dir in run_dirs:
        try:
            facts = _facts(run_dir)
            lines += _lines(facts)
        except Exception as exc:  # noqa: BLE001 - one odd run directory must not hide the others
            why = f"its files cannot be read: {said(exc)}"
            facts = {"run_dir": str(run_dir.path), "alive": False, "trouble": [why]}
            lines.append(f"run directory {run_dir.path}: {why}")
        found.append(facts)
    if not found:
        lines = ["no agent of this user has run here: is share.redis_url or share.peers set?"]
    healthy = bool(found) and all(facts["alive"] and not facts["trouble"] for facts in found)
    emit(lines, {"agents": found, "ok": healthy}, as_json=as_json)
    return 0 if healthy else 1


def _facts(run_dir: RunDir) -> dict[str, Any]:
    refuse_irregular(run_dir.path)
    status = run_dir.status()
    agent = run_dir.agent()
    age = time.time() - status.get("written_at", 0.0)
    trouble = []
    if agent is not None and age > _STALE_S:
        trouble.append("the agent has not reported for a while" if status else "no report yet")
    trouble += [
        f"{feed.get('kind')} {feed.get('address')}: not connected: {feed.get('last_error')}"
        for feed in status.get("feeds", [])
        if not feed.get("connected")
    ]
    trouble += [f"{where}: {why}" for where, why in status.get("refused_directories", {}).items()]
    return {
        "run_dir": str(run_dir.path),
        "alive": agent is not None,
        "pid": (agent or {}).get("pid"),
        "age_s": age,
        "trouble": trouble,
        "breakers": run_dir.breakers(),
        "status": status,
    }


def _lines(facts: dict[str, Any]) -> list[str]:
    status = facts["status"]
    state = f"agent {facts['pid']}" if facts["alive"] else "NO AGENT"
    where = f"{status.get('address', 'no address')}, cluster {status.get('cluster_id', '?')}"
    lines = [
        f"{status.get('nid', '?')}  {state}, {where}, {status.get('ranks', 0)} rank processes",
        f"  run directory {facts['run_dir']}",
    ]
    lines += [
        f"  serves {name}: {pages} pages" for name, pages in status.get("served_pages", {}).items()
    ]
    lines += [f"  TROUBLE {text}" for text in facts["trouble"]]
    peers = status.get("peers", [])
    rows = [
        [
            *(peer[name] for name in ("nid", "address", "state", "pages", "behind")),
            _breaker(facts, peer["nid"]),
        ]
        for peer in peers
    ]
    if rows:
        lines += table(["node", "address", "state", "pages", "behind", "breaker"], rows)
    else:
        lines.append("  no other node")
    return lines


def _breaker(facts: dict[str, Any], node_id: str) -> str:
    """State of the breakers that the rank processes of this node have for that one."""
    ranks = facts["breakers"]
    reasons = [states[node_id] for states in ranks.values() if node_id in states]
    return f"open in {len(reasons)} of {len(ranks)}: {reasons[0]}" if reasons else "closed"
