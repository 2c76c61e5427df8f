"""Pure functions over prefixes: what SGLang may use of a partly successful answer."""

from __future__ import annotations

from collections.abc import Sequence


def leading_run(flags: Sequence[bool]) -> int:
    """Number of True values before the first False."""
    for count, flag in enumerate(flags):
        if not flag:
            return count
    return len(flags)


def cut_after_first_failure(flags: Sequence[bool]) -> list[bool]:
    """The same list with everything after the first False set to False.

    SGLang uses the leading run only; a True behind a hole would claim more than it can use.
    """
    run = leading_run(flags)
    return [True] * run + [False] * (len(flags) - run)
