"""Causes in the traffic: pages asked for, written, evicted, or not delivered. One pure function each.

As in ``setup``: ``Facts`` in, a ``Finding`` or None out.
"""

from __future__ import annotations

from collections.abc import Sequence

from flexkv_sglang.backends.checksum import ACCEPTED_KINDS, ChecksumKind
from flexkv_sglang.cli.doctor.facts import Facts, Group
from flexkv_sglang.cli.doctor.namespace_diff import closest_pairs, describe, family
from flexkv_sglang.cli.doctor.server import THRESHOLD, Server
from flexkv_sglang.cli.doctor.setup import Finding, is_low
from flexkv_sglang.cli.output import counted, human_bytes, human_seconds

_PAIRS_MAX = 3
_FEW = 0.01  # of the found pages: fewer late pages than this are ignored
_SERVED_ABOVE = 0.25  # of the prompt tokens
_CACHED = "sglang:cached_tokens_total"
_LEVELS = {
    ChecksumKind.NONE: "off",
    ChecksumKind.XXH3_64_SAMPLED: "sampled",
    ChecksumKind.XXH3_64: "full",
}
_POLICIES = {
    "write_back": "write_back writes a page only when host memory evicts it",
    "write_through_selective": "write_through_selective writes a page from its second use on",
    "write_through": "write_through writes at once, so the pages did not arrive",
}
_UNUSED = {
    "below_threshold": "the stored run was shorter than prefetch_threshold: lower it",
    "host_capacity": "host memory had no room: raise --hicache-size",
    "device_capacity": "the device had no room",
    "deadline": "the prefetch was stopped before it was done: --hicache-storage-prefetch-policy, or its timeout",
    "storage_transfer": "the pages were not delivered: see the other findings",
}
"""Reasons of SGLang's ``storage_prefetch_unfulfilled_tokens_total`` that an operator can change."""


def nothing_asked(facts: Facts) -> Finding | None:
    """SGLang never asked storage: no traffic, prompts too short, or host memory answers."""
    server = facts.server
    if not facts.alive or (facts.count("asked_pages") and not _is_idle(server)):
        return None
    known = server is not None and server.config is not None
    threshold = server.threshold if server is not None and not server.error else THRESHOLD
    unless = "" if known else f", {THRESHOLD} unless configured"
    traffic = _traffic(server)
    title, remedy = (
        "SGLang has not asked storage for anything yet",
        (
            f"It asks when enough tokens of a prompt (prefetch_threshold{unless or f': {threshold}'}) are not in "
            "device or host memory. Give --url and run the server with --enable-metrics to see which it is"
        ),
    )
    if server is not None and server.metrics:
        requests, prompt, above = _requests(server), _prompt_tokens(server), _above(server)
        if _is_idle(server):
            title = "There was no request yet, or only the one SGLang warms up with"
            remedy = "Send some. The first time a prompt is seen it cannot be found"
        elif prompt and above >= _SERVED_ABOVE * prompt:
            return served_above(facts)
        elif requests and prompt / requests < threshold:
            title = "Prompts are shorter than prefetch_threshold"
            remedy = f"SGLang asks for {threshold} tokens or more: lower prefetch_threshold in the extra config"
    asked = facts.count("asked_pages")
    return Finding("nothing_asked", title, f"asked for {counted(asked, 'page')}{traffic}", remedy)


def served_above(facts: Facts) -> Finding | None:
    """Device and host memory still hold the repeated tokens; storage hits follow an eviction or restart."""
    server = facts.server
    if server is None or not server.metrics or facts.count("found_pages") or not facts.alive:
        return None
    if _above(server) < _SERVED_ABOVE * max(1.0, _prompt_tokens(server)):
        return None
    return Finding(
        "served_above",
        "Device and host memory still serve the repeated prompts",
        f"asked for {facts.count('asked_pages')} pages, found 0{_traffic(server)}",
        "Nothing is wrong. SGLang asks storage only for pages that they lost: after a restart, on another replica, or "
        "when the working set is larger than --hicache-size",
    )


def nothing_written(facts: Facts) -> Finding | None:
    """No page is stored and none was written."""
    if facts.pages or facts.count("write_pages") or not facts.alive or _is_idle(facts.server):
        return None
    unstored = {
        name: facts.count(f"write_{name}_pages") for name in ("refused", "failed", "declined")
    }
    policy = facts.server.setting("hicache_write_policy") if facts.server else None
    evidence = f"wrote 0 pages, 0 are stored; {_listed(unstored)}"
    if policy is not None:
        evidence += f"; hicache_write_policy is {policy}{_traffic(facts.server)}"
    why = _POLICIES.get(str(policy), "")
    if unstored["refused"] + unstored["failed"]:
        remedy = "The disk or the size: see the server's log"
    elif why:
        remedy = why[0].upper() + why[1:] + ". Use --hicache-write-policy write_through"
        if policy == "write_through":
            remedy = "write_through writes at once: send a prompt of several pages; then see the server's log"
    else:
        remedy = (
            "The write policy decides when pages are written: "
            + "; ".join(list(_POLICIES.values())[:2])
            + ". --hicache-write-policy write_through writes at once"
        )
    return Finding("nothing_written", "Nothing was written yet", evidence, remedy)


def other_namespace(facts: Facts) -> Finding | None:
    """Pages of servers that cannot share: names the fields that differ, the closest pair first."""
    families: dict[str, Group] = {}
    for group in facts.groups:
        if group.pool == "kv" and group.namespace.fields and (group.pages or group.alive):
            key = family(group.namespace.fields)
            held = families.get(key)
            if held is None or (group.alive, group.pages) > (held.alive, held.pages):
                families[key] = group
    groups = list(families.values())
    pairs = closest_pairs([group.namespace.fields for group in groups])
    if not pairs:
        return None
    lines = [
        f"{_named(groups[pair.first])} and {_named(groups[pair.second])} differ in {describe(pair)}"
        for pair in pairs[:_PAIRS_MAX]
    ]
    if len(pairs) > _PAIRS_MAX:
        lines.append(f"{len(pairs) - _PAIRS_MAX} more pairs")
    return Finding(
        "other_namespace",
        f"Pages lie in {len(groups)} namespaces that do not share",
        "; ".join(lines),
        "Replicas share when all of these agree: start them alike. Right as it is if these are different models; "
        "flexkv gc --namespace removes one that is not used any more",
        "cause" if is_low(facts) else "note",
    )


def verify_level(facts: Facts) -> Finding | None:
    """A reader ignores pages that were written with less verification than it asks for."""
    config = facts.server.config if facts.server is not None else None
    for group in facts.groups:
        kinds: dict[int, int] = {}
        for item in group.owners:
            for kind, pages in item.checksums.items():
                kinds[kind] = kinds.get(kind, 0) + pages
        accepted = ACCEPTED_KINDS[config.verify] if config else ACCEPTED_KINDS["full"]
        refused = sum(pages for kind, pages in kinds.items() if kind not in accepted)
        if not refused or (config is None and len(kinds) < 2):
            continue
        levels = ", ".join(f"{pages} with {_level(kind)}" for kind, pages in sorted(kinds.items()))
        return Finding(
            "verify_level",
            "Pages were written with less verification than servers ask for",
            f"{group.namespace.name}: pages written {levels}; "
            f"{refused} do not exist for a server with verify={config.verify if config else 'full'}",
            "Give all servers of this directory the same 'verify'",
            "cause" if is_low(facts) else "note",
        )
    return None


def hybrid_pool(facts: Facts) -> Finding | None:
    """A pool beside KV that is missing, empty, or has few of the pages that KV finds."""
    if not is_low(facts):
        return None
    wanted = {
        str(claim["name"])
        for group in facts.groups
        if group.pool == "kv"
        for claim in group.namespace.fields.get("pools") or []
        if isinstance(claim, dict) and "name" in claim
    } - {"kv"}
    live = [group for group in facts.groups if group.alive or not facts.alive]
    noted = [group.namespace.fields.get("unstored") for group in live if group.pool == "kv"]
    unstored = {k: v for found in noted if isinstance(found, dict) for k, v in found.items()}
    for name in (*unstored, *sorted(wanted | {group.pool for group in live} - {"kv"})):
        evidence = _pool_trouble(facts, name, [group for group in live if group.pool == name])
        if name in unstored:
            evidence = f"it is not stored: {unstored[name]}; {evidence}".removesuffix("; ")
        if evidence:
            return Finding(
                "hybrid_pool",
                f"The model needs pool {name!r} beside KV, and it lacks pages",
                evidence,
                "'is not stored' in the log: size is too small for all pools. Much evicted: raise pool_density of this "
                "pool. State of Mamba layers exists at the ends of nodes only: prompts must share such an end",
            )
    return None


def _pool_trouble(facts: Facts, name: str, groups: Sequence[Group]) -> str:
    kv = f"KV has {facts.pages} pages, found {facts.count('found_pages')} of {facts.count('asked_pages')}"
    if not any(group.owners for group in groups):
        return f"it was announced and has no files; {kv}"
    pages, evicted = sum(group.pages for group in groups), facts.count("evicted_pages", name)
    asked, found = facts.count("asked_pages", name), facts.count("found_pages", name)
    text = f"pool {name} has {pages} pages, found {found} of {asked}, evicted {evicted}; {kv}"
    if facts.pages and not pages:
        return text
    return text if asked and found < 0.5 * asked and facts.pages else ""


def corrupt(facts: Facts) -> Finding | None:
    """Bytes that changed on the disk."""
    pages = facts.count("corrupt_pages", None)
    if not pages:
        return None
    return Finding(
        "corrupt",
        "The disk changes bytes",
        f"{counted(pages, 'page')} failed the checksum and {'was' if pages == 1 else 'were'} dropped, of "
        f"{pages + facts.count('read_pages', None)} read",
        "flexkv check DIR reads every page. Look at the disk (smartctl, dmesg). None of them was served",
    )


def late(facts: Facts) -> Finding | None:
    """Reads that did not begin before the deadline."""
    pages, found = facts.count("read_late_pages", None), facts.count("found_pages", None)
    if not pages or pages < _FEW * found:
        return None
    median = facts.median("get_seconds")
    took = "unknown" if median is None else _at_most(median)
    modes = {p.disk.mode.engine for p in facts.places if p.disk is not None and p.disk.mode}
    return Finding(
        "late",
        "The disk is too slow for SGLang's prefetch timeout",
        f"{counted(pages, 'page')} of {found} found came too late; the median get takes {took}; "
        f"I/O here: {', '.join(sorted(modes)) or 'unknown'}",
        "flexkv bench ssd DIR measures the disk. Raise prefetch_timeout_base or prefetch_timeout_per_ki_token in the "
        "extra config, use a faster disk, or several",
    )


def failures(facts: Facts) -> Finding | None:
    """I/O errors, whole operations and calls that failed."""
    failed = {
        **facts.counts_ending("_failed_pages"),
        **facts.counts_ending("_errors"),
        **facts.counts_ending("_exceptions"),
    }
    if not failed:
        return None
    return Finding(
        "failures",
        "Operations failed and were answered as misses",
        _listed(failed),
        "The server's log has each with its reason ('flexkv: ... failed'). Look at the disk; an exception with a good "
        "disk is a defect: report it",
    )


def too_small(facts: Facts) -> Finding | None:
    """Evicted and declined pages are about as many as written ones."""
    written, evicted = facts.count("write_pages"), facts.count("evicted_pages")
    declined, refused = facts.count("write_declined_pages"), facts.count("write_refused_pages")
    gone = evicted + declined + refused
    if not is_low(facts) or not gone or 2 * gone < written + declined:
        return None
    age = facts.median("evicted_age_seconds")
    when = "" if age is None else f"; half of them unused for {_at_most(age)}"
    items = [item for group in facts.groups if group.pool == "kv" for item in group.owners]
    slots = sum(item.slots for item in items if item.owner.alive or not facts.alive)
    size = sum(
        item.slots * item.payload_bytes for item in items if item.owner.alive or not facts.alive
    )
    return Finding(
        "too_small",
        "The tier is too small for the pages that are asked for again",
        f"wrote {written}, evicted {evicted}{when}; declined {declined}, no slot for {refused}; {slots} slots, "
        f"{human_bytes(size)}",
        "Raise size (or add directories) until pages stay longer than sessions pause",
    )


def unused_hits(facts: Facts) -> Finding | None:
    """SGLang found tokens in storage and did not use them."""
    server = facts.server
    if server is None:
        return None
    name = "sglang:storage_prefetch_unfulfilled_tokens_total"
    lost = {reason: int(server.total(name, reason=reason)) for reason in _UNUSED}
    lost = {reason: tokens for reason, tokens in lost.items() if tokens}
    used = server.total("sglang:prefetched_tokens_total")
    if not lost or sum(lost.values()) < used:
        return None
    worst = max(lost, key=lambda reason: lost[reason])
    return Finding(
        "hits_not_used",
        "SGLang found pages in storage and did not use them",
        f"tokens found and not used: {_listed(lost)}; prefetched {int(used)}",
        f"{worst}: {_UNUSED[worst]}",
    )


def prompts_differ(facts: Facts) -> Finding | None:
    """Few of the asked pages are stored: prompts have no common start, or pages were cleared."""
    asked, found = facts.count("asked_pages"), facts.count("found_pages")
    if not asked or not is_low(facts):
        return None
    clears = facts.count("clears", None)
    cleared = f", cleared {counted(clears, 'time')}" if clears else ""
    hint = "" if facts.server is not None and facts.server.metrics else _NOT_TOLD
    return Finding(
        "prompts_differ",
        "The pages asked for are not among the stored ones",
        f"found {found} of {asked} pages asked for; {facts.pages} are stored{cleared}{_traffic(facts.server)}",
        "A time stamp or a user's name at the start of a prompt changes every page after it: put varying text last. "
        f"The first time a prompt is seen it cannot be found.{hint}",
    )


_NOT_TOLD = (
    " Or repeats are served by device and host memory: --url and --enable-metrics tell. A hybrid model: 'cannot be "
    "stored' in the log"
)


def _requests(server: Server) -> float:
    return server.total("sglang:num_requests_total")


def _is_idle(server: Server | None) -> bool:
    """True if it has served only the request that SGLang warms up with."""
    return server is not None and bool(server.metrics) and _requests(server) <= 1


def _prompt_tokens(server: Server) -> float:
    return server.total("sglang:prompt_tokens_total")


def _above(server: Server) -> float:
    """Prompt tokens that device and host memory served."""
    return sum(server.total(_CACHED, cache_source=source) for source in ("device", "host"))


def _traffic(server: Server | None) -> str:
    if server is None or not server.metrics:
        return ""
    device, host = (int(server.total(_CACHED, cache_source=name)) for name in ("device", "host"))
    return (
        f"; {counted(int(_requests(server)), 'request')} with {int(_prompt_tokens(server))} prompt tokens, "
        f"of which device memory served {device} and host memory {host}"
    )


def _at_most(seconds: float) -> str:
    """Text for the upper bound of a bucket; the last bucket has none."""
    return f"at most {human_seconds(seconds)}" if seconds < float("inf") else "longer than measured"


def _named(group: Group) -> str:
    state = "alive" if group.alive else "no process"
    return f"{group.namespace.name} ({group.pages} pages, {state})"


def _listed(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def _level(kind: int) -> str:
    level = _LEVELS.get(ChecksumKind(kind)) if kind in list(ChecksumKind) else None
    return f"verify={level}" if level else f"an unknown checksum ({kind})"
