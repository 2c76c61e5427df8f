"""Head groups: pages cut by attention heads, so that servers of different tensor-parallel sizes share them.

``tp_lcm_size`` (SGLang's setting) is a multiple of all tensor-parallel sizes that share pages. It is the number of
groups of a model's heads; rank r of n has ``tp_lcm_size / n`` of them, one after the other. Each group of a page is
stored in its own slot, under its own key, in one namespace for all ranks of all sizes. A rank has a page when it has
all its groups of it.

Pure.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from flexkv_sglang.types import PageKey

GROUPS_MAX = 1 << 16
"""Head groups per page at most: the number of a group is folded into two bytes of the key."""


@dataclass(frozen=True, slots=True)
class HeadGroups:
    """The groups of one rank: ``first`` to ``first + count - 1`` of ``lcm``. ``lcm`` is 0 if pages are not cut."""

    lcm: int = 0
    first: int = 0
    count: int = 1

    @classmethod
    def of(cls, config: Any) -> HeadGroups:
        """From SGLang's ``HiCacheStorageConfig``. Models whose ranks have the same bytes need no groups."""
        lcm = int(getattr(config, "tp_lcm_size", None) or 0)
        if not lcm or config.is_mla_model:
            return WHOLE
        count, rest = divmod(lcm, int(config.tp_size))
        return cls(lcm, int(config.tp_rank) * count, 0 if rest else count)

    @property
    def split(self) -> bool:
        """True if pages are cut."""
        return self.lcm > 0

    def obstacle(self, layout: str) -> str | None:
        """Why pages in this host layout cannot be cut like this; None if they can."""
        if not self.count:
            return "it is no multiple of the tensor-parallel size"
        if self.lcm > GROUPS_MAX:
            return f"more than {GROUPS_MAX} groups"
        if layout != "page_head":
            return f"the host layout is {layout}, and has to be page_head"
        return None

    def keys(self, keys: Sequence[PageKey]) -> Sequence[PageKey]:
        """The keys of the groups of these pages, page after page.

        The number of a group goes into the first bytes, which also seed the checksum: two groups of one page that
        changed places fail it.
        """
        if not self.split:
            return keys
        groups = range(self.first, self.first + self.count)
        found = []
        for key in keys:
            head, tail = int.from_bytes(key[:2], "little"), key[2:]
            found += [PageKey((head ^ group).to_bytes(2, "little") + tail) for group in groups]
        return found

    def last_key(self, key: PageKey | None) -> PageKey | None:
        """The key of the last group of a page: the parent of the page after it."""
        return key if key is None else self.keys([key])[-1]

    def whole(self, flags: Sequence[bool]) -> list[bool]:
        """One flag per group -> one flag per page, True if all its groups are."""
        if self.count == 1:
            return list(flags)
        return [all(flags[i : i + self.count]) for i in range(0, len(flags), self.count)]


WHOLE = HeadGroups()
"""Pages are not cut."""
