"""Causes between machines: agent, Redis, other nodes. One pure function each.

As in ``setup``: ``Facts`` in, a ``Finding`` or None out. With a good hit rate they are notes: the pages of this node
are enough then. Sharing does not depend on clocks, so there is no cause about them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from ipaddress import ip_address
from typing import Any
from urllib.parse import urlsplit

from flexkv_sglang.cli.doctor.facts import Facts
from flexkv_sglang.cli.doctor.fleet_facts import Fleet
from flexkv_sglang.cli.doctor.namespace_diff import closest_pairs, describe
from flexkv_sglang.cli.doctor.setup import Finding, is_low
from flexkv_sglang.cli.output import counted, human_seconds

_SHOWN = 3


def _finding(facts: Facts, what: str, title: str, evidence: str, remedy: str) -> Finding:
    return Finding(what, title, evidence, remedy, "cause" if is_low(facts) else "note")


def no_agent(facts: Facts) -> Finding | None:
    """Sharing is configured and servers run, but no agent."""
    for fleet in facts.fleets:
        if fleet.agent is None and (fleet.ranks or facts.alive):
            said = f"; the last line of agent.log there: {fleet.said}" if fleet.said else ""
            return _finding(
                *(facts, "no_agent", "No agent lives on this machine, so nothing is shared"),
                f"run directory {fleet.run_dir}{said}",
                "A server starts it again within 5 s, later if it keeps ending. If it does not stay, its log has "
                "the reason. "
                "flexkv agent --config FILE runs it in the foreground",
            )
    return None


def agent_silent(facts: Facts) -> Finding | None:
    """The agent holds its lock and reports nothing."""
    for fleet in facts.fleets:
        if fleet.agent is not None and not fleet.reports and fleet.status:
            return _finding(
                *(facts, "agent_silent", "The agent of this machine hangs"),
                f"process {fleet.agent.get('pid')}, last report {human_seconds(fleet.age_s)} ago",
                "A disk that does not answer holds it up (dmesg). End the process: a server starts a new one",
            )
    return None


def agent_differs(facts: Facts) -> Finding | None:
    """Servers whose settings of ``share`` differ from the agent's: they share nothing."""
    for fleet in facts.fleets:
        other = [name for name, said in fleet.ranks.items() if said.get("usable") is False]
        if fleet.agent is not None and (other or fleet.differs):
            return _finding(
                *(facts, "agent_differs", "The agent runs with other settings than a server"),
                f"{len(other)} of {counted(len(fleet.ranks), 'server rank')} do not use agent "
                f"{fleet.agent.get('pid')} of {fleet.run_dir}",
                "Give all servers of a machine the same object share, or share.run_dir of their own. After a change of "
                "settings end the agent: the next server starts one with the new ones",
            )
    return None


def agent_unfit(facts: Facts) -> Finding | None:
    """Server processes that do not use the agent, with the reason that they found."""
    reasons = [why for why, value in facts.gauges("agent_unfit").items() if value > 0]
    if not reasons:
        return None
    return _finding(
        *(facts, "agent_unfit", "The agent of this machine does not fit a server"),
        ", ".join(sorted(reasons)),
        "A server replaces it when no other server needs it, and says in its log what holds it up. Give all servers "
        "of a machine one release and one object share, and restart the older ones",
    )


def loopback_only(facts: Facts) -> Finding | None:
    """Others are elsewhere, and cannot reach this node: without a secret it listens on loopback."""
    for fleet in _reporting(facts):
        address = str(fleet.status.get("address", ""))
        far = [str(feed.get("address")) for feed in fleet.status.get("feeds", ())]
        far = [where for where in far if not _is_loopback(where)]
        if address and _is_loopback(address) and far and not fleet.status.get("guarded", True):
            return _finding(
                *(facts, "loopback_only", "Other machines cannot read this one's pages"),
                f"the agent listens at {address} only, and meets others at {far[0]}; no share.secret_file is set",
                "Put the same 32 random bytes on every machine (head -c 32 /dev/urandom, mode 0600) and set "
                'share.secret_file. Or "insecure": true, if every client of the port may read pages',
            )
    return None


def redis_down(facts: Facts) -> Finding | None:
    """Redis does not answer: no news of other nodes."""
    for fleet in _reporting(facts):
        for feed in fleet.feeds("redis"):
            if not feed.get("connected"):
                return _finding(
                    *(
                        facts,
                        "redis_down",
                        "Redis does not answer, so there is no news of other nodes",
                    ),
                    f"{feed.get('address')} for {human_seconds(float(feed.get('since_s', 0)))}: "
                    f"{feed.get('last_error') or 'no answer yet'}",
                    "Look at the address, a firewall, the password (share.redis_password_file) and the rights of the "
                    "user (docs/OPERATING.md, Redis). Known pages stay in use; the agent tries again every few seconds",
                )
    return None


def peer_unreachable(facts: Facts) -> Finding | None:
    """Agents in ``peers`` that do not answer."""
    for fleet in _reporting(facts):
        silent = [feed for feed in fleet.feeds("peer") if not feed.get("connected")]
        if silent:
            shown = [f"{feed.get('address')}: {feed.get('last_error')}" for feed in silent[:_SHOWN]]
            return _finding(
                *(facts, "peer_unreachable", "Nodes that are named in share.peers do not answer"),
                f"{len(silent)} of {len(fleet.feeds('peer'))}: {'; '.join(shown)}",
                "Is a server, and so an agent, running there? Does it listen at that address (flexkv nodes there)? Do "
                "secret_file and cluster_id agree? Is the port open?",
            )
    return None


def no_other_node(facts: Facts) -> Finding | None:
    """The agent is connected, and no other node is alive."""
    for fleet in _reporting(facts):
        feeds = fleet.status.get("feeds", ())
        if fleet.peers_up or not any(feed.get("connected") for feed in feeds):
            continue
        down = [str(peer.get("nid")) for peer in fleet.status.get("peers", ())]
        known = f"{', '.join(down[:_SHOWN])}: down" if down else "none was ever seen"
        return _finding(
            *(facts, "no_other_node", "No other node is alive"),
            f"cluster {fleet.status.get('cluster_id')!r}, share_group {fleet.status.get('pod', '')!r}; {known}",
            "Start the others with the same Redis (and database number), cluster_id and share_group, or name them in "
            "share.peers. flexkv nodes lists on each machine the nodes it sees",
        )
    return None


def no_common_namespace(facts: Facts) -> Finding | None:
    """Other nodes are alive, and hold only pages of other models, dtypes, page sizes, ..."""
    for fleet in _reporting(facts):
        ours = set(fleet.status.get("namespaces", ()))
        told = [peer for peer in fleet.peers_up if "serves" in peer]
        theirs = {name for peer in told for name in peer["serves"]}
        if not ours or not theirs or ours & theirs:
            continue
        return _finding(
            *(
                facts,
                "no_common_namespace",
                "Other nodes are alive, but their pages are of other namespaces",
            ),
            f"here {_some(ours)}; {counted(len(told), 'other node')}: {_some(theirs)}. "
            + _difference(facts, ours, theirs),
            "Pages are shared by servers that agree in model, dtype, layout, page size, tensor-parallel size and the "
            "settings that change KV values: start them alike. flexkv stats DIR on both machines shows what each has",
        )
    return None


def peer_breaker(facts: Facts) -> Finding | None:
    """Nodes that rank processes do not ask, because they failed."""
    for fleet in facts.fleets:
        reasons: dict[str, list[str]] = {}
        for said in fleet.ranks.values():
            for node_id, why in dict(said.get("breakers", {})).items():
                reasons.setdefault(node_id, []).append(why)
        if reasons:
            shown = [
                f"{node_id} by {len(whys)} of {len(fleet.ranks)}: {whys[0]}"
                for node_id, whys in sorted(reasons.items())[:_SHOWN]
            ]
            return _finding(
                *(facts, "peer_breaker", "Nodes that failed are not asked for some time"),
                "; ".join(shown),
                "Look at that machine: does its agent live (flexkv nodes), is its port open from here, is the network "
                "slow? It is greeted every 2 to 30 seconds and asked again when it answers",
            )
    return None


def _reporting(facts: Facts) -> Iterator[Fleet]:
    return (fleet for fleet in facts.fleets if fleet.reports)


def _is_loopback(where: str) -> bool:
    """True for a loopback address: "host:port" or a URL. False for several hosts or an unknown name."""
    try:
        host = urlsplit(where if "://" in where else f"//{where}").hostname or ""
        return (
            urlsplit(where).scheme == "unix" or host == "localhost" or ip_address(host).is_loopback
        )
    except ValueError:
        return False


def _some(names: set[str]) -> str:
    shown = sorted(names)[:_SHOWN]
    return ", ".join(shown) + (", ..." if len(names) > len(shown) else "")


def _difference(facts: Facts, ours: set[str], theirs: set[str]) -> str:
    """The fields that differ, if a directory here has or had pages of both."""
    known: dict[str, Mapping[str, Any]] = {
        group.namespace.name: group.namespace.fields for group in facts.groups
    }
    pairs = [
        pair
        for one in sorted(ours & known.keys())
        for other in sorted(theirs & known.keys())
        for pair in closest_pairs([known[one], known[other]])
    ]
    if not pairs:
        return "Which field differs cannot be told from here"
    return f"They differ in {describe(min(pairs, key=lambda pair: len(pair.fields)))}"
