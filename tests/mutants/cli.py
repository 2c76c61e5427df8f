"""Seeded bugs in the commands on directories, for ``run.py``: (name, file, old line, new line, tests)."""

from __future__ import annotations

HOSTILE = "tests/cli/test_hostile_directory.py"
DIRECTORY = "flexkv_sglang/cli/directory"

MUTANTS = (
    (
        "cli: root repairs with its own rights",
        f"{DIRECTORY}/acting.py",
        "        os.seteuid(uid)\n",
        "",
        HOSTILE,
    ),
    (
        "cli: files of another user are opened",
        f"{DIRECTORY}/trusted_files.py",
        "    if found.st_uid != uid:\n",
        "    if False:\n",
        HOSTILE,
    ),
    (
        "cli: a link to a namespace folder is followed",
        f"{DIRECTORY}/scan.py",
        "found = path.stat() if resolved else path.lstat()",
        "found = path.stat()",
        HOSTILE,
    ),
    (
        "cli: who has lost its lock file is dead",
        f"{DIRECTORY}/trusted_files.py",
        "return True if exc.errno == errno.EAGAIN else None",
        "return False",
        HOSTILE,
    ),
    (
        "cli: control characters reach the terminal",
        "flexkv_sglang/printable.py",
        "return _UNPRINTABLE.sub(_escaped, without_passwords(text))",
        "return without_passwords(text)",
        "tests/test_printable.py",
    ),
    (
        "cli: the name of a key does not make its value a secret",
        "flexkv_sglang/printable.py",
        "        if _SECRET_NAME.search(name) and not _NOT_SECRET.search(name):\n",
        "        if False:\n",
        "tests/test_printable.py",
    ),
)
