"""Causes in the files themselves: not ours, read-only, without answer, or of dead servers that fill the disk."""

from __future__ import annotations

from flexkv_sglang.cli.doctor.facts import DirectoryFacts, Facts
from flexkv_sglang.cli.doctor.setup import Finding
from flexkv_sglang.cli.output import counted, human_bytes

_SHOWN = 3


def hung_directory(facts: Facts) -> Finding | None:
    """A directory that does not answer at all."""
    for place in facts.places:
        if place.hung:
            return Finding(
                "hung_directory",
                "The disk does not answer",
                f"{place.path}: listing it, and writing a byte there, took longer than the patience of this command",
                "Look at the disk (dmesg), the mount and, for fsfreeze, who froze it. A server bypasses the directory "
                "meanwhile and comes back by itself",
            )
    return None


def read_only(facts: Facts) -> Finding | None:
    """Pages can be read there, and none can be written."""
    for place in facts.places:
        if place.read_only:
            return Finding(
                "read_only",
                "The file system is read-only",
                f"{place.path} is mounted read-only; its pages were looked at without locks of our own",
                "mount -o remount,rw, and dmesg if the kernel did this after an error of the disk",
            )
    return None


def foreign_files(facts: Facts) -> Finding | None:
    """Files and folders that are not the servers' own: they are left alone, and nothing in them is believed."""
    reasons = [
        f"{item.owner.directory / reason}"
        for group in facts.groups
        for item in group.owners
        for reason in item.owner.foreign
    ] + [f"{item.path} {item.reason}" for place in facts.places for item in place.refused]
    if not reasons:
        return None
    more = f"; and {len(reasons) - _SHOWN} more" if len(reasons) > _SHOWN else ""
    return Finding(
        "foreign_files",
        "Some files here are not ours, and are left alone",
        "; ".join(reasons[:_SHOWN]) + more,
        "Run all servers of a directory as one user. chown -R gives that user files that an operator has made; remove "
        "what nobody knows",
        "cause"
        if any(item.owner.foreign for group in facts.groups for item in group.owners)
        else "note",
    )


def dead_files(facts: Facts) -> Finding | None:
    """Files of dead owners take more space than is free: a start may be refused for want of space."""
    for place in facts.places:
        dead = [item for group in place.groups for item in group.owners if not item.owner.alive]
        size = sum(item.owner.disk_bytes() for item in dead)
        if (
            place.disk is None
            or not dead
            or place.disk.free_bytes >= max(size, place.disk.floor_bytes)
        ):
            continue
        return Finding(
            "dead_files",
            "Files of servers that ended take the space",
            f"{place.path}: {counted(len(dead), 'dead owner')} with {human_bytes(size)} "
            f"({_largest(place)}), {human_bytes(place.disk.free_bytes)} free",
            f"A start with the same model adopts its own. flexkv gc {place.path} lists them; "
            f"flexkv gc {place.path} --older-than 0s --yes removes them all",
            "cause" if facts.alive and place.disk.free_bytes < place.disk.floor_bytes else "note",
        )
    return None


def _largest(place: DirectoryFacts) -> str:
    """The namespaces whose dead owners take most."""
    sizes = {
        group.namespace.name: sum(
            item.owner.disk_bytes() for item in group.owners if not item.owner.alive
        )
        for group in place.groups
    }
    shown = sorted(sizes, key=lambda name: -sizes[name])[:_SHOWN]
    return ", ".join(f"{name}: {human_bytes(sizes[name])}" for name in shown if sizes[name])
