"""Of what size are the memory pages behind an address? Large ones make transfers cheaper. Linux only.

Reads ``/proc/self/maps`` (proc(5)), not ``smaps``: that would walk the page tables of a pool of hundreds of GB.
"""

from __future__ import annotations

import re
from pathlib import Path

_MAPS = Path("/proc/self/maps")
_TRANSPARENT = Path("/sys/kernel/mm/transparent_hugepage/enabled")
_LINE = re.compile(r"([0-9a-f]+)-([0-9a-f]+) (\S{4}) \S+ \S+ \S+\s*(.*)")


def huge_pages(address: int) -> str:
    """ "reserved" (hugetlbfs), "transparent" (given where there are some: SGLang asks for them), "none", "unknown"."""
    try:
        lines = _MAPS.read_text().splitlines()
        transparent = _TRANSPARENT.exists() and "[never]" not in _TRANSPARENT.read_text()
    except OSError:
        return "unknown"
    for line in lines:
        match = _LINE.match(line)
        if match and int(match[1], 16) <= address < int(match[2], 16):
            if "hugepage" in match[4]:
                return "reserved"
            private = match[3].endswith("p") and not match[4]
            return "transparent" if private and transparent else "none"
    return "unknown"
