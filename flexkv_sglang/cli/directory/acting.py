"""Root does a command's work with the rights of the folder's owner, so that no link or name leads root astray.

New files then belong to that user as well: a server of that user can read what root has repaired.
"""

from __future__ import annotations

import os
import pwd
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def acting_as(uid: int, gid: int) -> Iterator[None]:
    """The block runs as this user and group, without other groups. Only root changes; others go on as they are.

    Threads: the process has one. Raises ``PermissionError`` where this root may not do so (a user namespace).
    """
    if os.geteuid() != 0 or uid == 0:
        yield
        return
    groups, group = os.getgroups(), os.getegid()
    try:
        os.setgroups([])
        os.setegid(gid)
        os.seteuid(uid)
        yield
    finally:
        os.seteuid(0)
        os.setegid(group)
        os.setgroups(groups)


def refusal(uid: int) -> str:
    """The reason why this process may not work on the files of ``uid``; "" if it may."""
    me = os.geteuid()
    if me in (0, uid):
        return ""
    return f"belongs to {user(uid)}, this is {user(me)}: run the command as that user, or as root"


def user(uid: int) -> str:
    """``user 1000 (ada)``."""
    try:
        return f"user {uid} ({pwd.getpwuid(uid).pw_name})"
    except KeyError:
        return f"user {uid}"
