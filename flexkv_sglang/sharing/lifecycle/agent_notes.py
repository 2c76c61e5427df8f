"""AgentNotes: what goes wrong in the agent, for the log of the server, which nobody would look for in another file.

The agent keeps its last warnings in ``agent.notes``, and one that cannot start leaves ``agent.failed``; every rank
process copies what is new. Threads: ``emit`` any; the others one each.
"""

from __future__ import annotations

import logging
import re
import time
from collections import deque
from typing import Any

from flexkv_sglang.log_limit import RateLimitedLog
from flexkv_sglang.sharing.run_dir import RunDir

logger = logging.getLogger(__name__)

NOTES, FAILED = "agent.notes", "agent.failed"
_LINES, _LINE_CHARS = 64, 300
_CONTROL = re.compile(r"[\x00-\x1f\x7f-\x9f\u200e\u200f\u202a-\u202e\u2066-\u2069]+")


class AgentNotes(logging.Handler):
    """Keeps the agent's last 64 warnings and errors; ``flush_to`` writes them. ``instance``: the agent's."""

    def __init__(self, instance: str) -> None:
        super().__init__(logging.WARNING)
        self._instance = instance
        self._number = 0
        self._written = 0
        self._lines: deque[dict[str, Any]] = deque(maxlen=_LINES)

    def emit(self, record: logging.LogRecord) -> None:
        """As ``logging.Handler``."""
        text = clean(record.getMessage())
        error = record.exc_info[1] if record.exc_info else None
        if error is not None:
            text = clean(f"{text}: {type(error).__name__}: {error}")
        self._number += 1
        self._lines.append(
            {"n": self._number, "at": record.created, "level": record.levelno, "text": text}
        )

    def flush_to(self, run_dir: RunDir) -> None:
        """Write ``agent.notes`` if there is news. Raises ``OSError``."""
        if self._written != self._number:
            number = self._number
            lines = {"instance": self._instance, "lines": list(self._lines)}
            run_dir.write_note(NOTES, lines)
            self._written = number


class NotesReader:
    """Copies new notes into this process's log: one line per kind and minute, with the prefix ``agent:``."""

    def __init__(self, run_dir: RunDir) -> None:
        self._run_dir = run_dir
        self._log = RateLimitedLog(logger)
        self._read_to = time.time()
        self._failed_to = time.time()
        self._instance = ""
        self._number = 0

    def copy(self) -> None:
        """Log what is new. Unreadable files are skipped."""
        notes = self._run_dir.note(NOTES)
        if notes.get("instance") != self._instance:
            self._instance, self._number = str(notes.get("instance", "")), 0
        for line in notes.get("lines", ()):
            try:
                number, at, level = int(line["n"]), float(line["at"]), int(line["level"])
                text = clean(str(line["text"]))
            except (KeyError, TypeError, ValueError):
                continue
            if number > self._number and at >= self._read_to:
                kind = re.sub(r"\d+", "0", text)
                self._log.log(kind, level, "flexkv: agent: %s", text.removeprefix("flexkv: "))
            self._number = max(self._number, number)
        self._copy_failure()

    def _copy_failure(self) -> None:
        failed = self._run_dir.note(FAILED)
        try:
            at, reason = float(failed.get("time", 0.0)), clean(str(failed.get("reason", "")))
        except (TypeError, ValueError):
            return
        if at > self._failed_to:
            self._failed_to = at
            text = "flexkv: agent: it could not start: %s. %s"
            remedy = clean(str(failed.get("remedy", "")))
            self._log.log("failed " + reason, logging.ERROR, text, reason, remedy)


def note_failure(run_dir: RunDir, reason: str, remedy: str) -> None:
    """Leave ``agent.failed``. Raises ``OSError``."""
    fields = {"time": time.time(), "reason": clean(reason), "remedy": clean(remedy)}
    run_dir.write_note(FAILED, fields)


def clean(text: str) -> str:
    """``text`` in one line without control characters, 300 characters at most."""
    return _CONTROL.sub(" ", text)[:_LINE_CHARS]
