"""RateLimitedLog: the first line at once, then one per interval with the number of those left out."""

from __future__ import annotations

import logging

import pytest

from flexkv_sglang import log_limit
from flexkv_sglang.log_limit import RateLimitedLog

LOGGER = logging.getLogger("flexkv_sglang.test_log_limit")


class _Clock:
    now = 1000.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def clock() -> _Clock:
    return _Clock()


@pytest.fixture
def limited(clock: _Clock, caplog: pytest.LogCaptureFixture) -> RateLimitedLog:
    caplog.set_level(logging.INFO)
    return RateLimitedLog(LOGGER, 60.0, clock)


def _texts(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records]


def test_the_first_line_comes_at_once_and_the_next_after_the_interval_with_the_number_left_out(
    limited: RateLimitedLog, clock: _Clock, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(4):
        limited.log("disk", logging.WARNING, "disk %s fails", "a")
    clock.now += 59.9
    limited.log("disk", logging.WARNING, "disk %s fails", "a")
    assert _texts(caplog) == ["disk a fails"]
    clock.now += 0.1
    limited.log("disk", logging.WARNING, "disk %s fails", "b")
    assert _texts(caplog)[1:] == ["disk b fails (4 more lines like this were left out)"]
    clock.now += 60.0
    limited.log("disk", logging.WARNING, "disk %s fails", "c")
    assert _texts(caplog)[2:] == ["disk c fails"], "none was left out since"


def test_kinds_do_not_silence_each_other(
    limited: RateLimitedLog, caplog: pytest.LogCaptureFixture
) -> None:
    limited.log("a", logging.INFO, "a")
    limited.log("b", logging.ERROR, "b")
    assert [(record.levelno, record.getMessage()) for record in caplog.records] == [
        (logging.INFO, "a"),
        (logging.ERROR, "b"),
    ]


def test_after_a_reset_the_next_line_comes_at_once(
    limited: RateLimitedLog, caplog: pytest.LogCaptureFixture
) -> None:
    for _ in range(3):
        limited.log("a", logging.INFO, "a")
    limited.reset("a")
    limited.log("a", logging.INFO, "a")
    assert _texts(caplog) == ["a", "a"]


def test_the_traceback_is_kept(limited: RateLimitedLog, caplog: pytest.LogCaptureFixture) -> None:
    error = ValueError("bad")
    limited.log("a", logging.ERROR, "a", exc_info=error)
    (record,) = caplog.records
    assert record.exc_info is not None
    assert record.exc_info[1] is error


def test_the_number_of_kinds_is_bounded(
    limited: RateLimitedLog, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(log_limit, "_KINDS_MAX", 2)
    for kind in ("a", "b", "c", "b", "a"):
        limited.log(kind, logging.INFO, kind)
    assert _texts(caplog) == ["a", "b", "c", "a"], "the oldest kind was forgotten"
