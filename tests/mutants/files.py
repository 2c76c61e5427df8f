"""Seeded bugs in the opening of files: (name, file, old, new, tests)."""

FOREIGN = "tests/backends/slots/test_foreign_files.py"

MUTANTS = (
    (
        "files: another user's file is believed",
        "backends/safe_files.py",
        "    _check_owner(path, about)\n    if about.st_mode & _WRITABLE_BY_OTHERS and not shared:",
        "    if about.st_mode & _WRITABLE_BY_OTHERS and not shared:",
        FOREIGN,
    ),
    (
        "files: links are followed",
        "backends/safe_files.py",
        "safe = os.O_NOFOLLOW | os.O_NONBLOCK",
        "safe = os.O_NONBLOCK",
        FOREIGN,
    ),
    (
        "files: what others may write is believed",
        "backends/safe_files.py",
        "if about.st_mode & _WRITABLE_BY_OTHERS and not shared:",
        "if False and not shared:",
        FOREIGN,
    ),
    (
        "files: a namespace folder of another user is used",
        "backends/safe_files.py",
        "        about = os.fstat(fd)\n        _check_owner(path, about)\n        if about",
        "        about = os.fstat(fd)\n        if about",
        FOREIGN,
    ),
    (
        "files: a number that is a text passes",
        "backends/slots/records.py",
        "if type(value) is not int or not low <= value < end:",
        "if not low <= int(value) < end:",
        FOREIGN,
    ),
    (
        "files: a journal of any size is read",
        "backends/slots/journal.py",
        '        if size > limit:\n            raise JournalError(f"{path} has',
        '        if size > 1 << 62:\n            raise JournalError(f"{path} has',
        FOREIGN,
    ),
    (
        "files: a secret of a foreign group passes",
        "backends/safe_files.py",
        "if about.st_gid not in (os.getegid(), *os.getgroups()):",
        "if about.st_gid < 0:",
        FOREIGN,
    ),
)
