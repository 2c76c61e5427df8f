"""PeriodicThread, JobThread and JobPool: steps and jobs that fail do not end them, and every wait has a bound."""

from __future__ import annotations

import logging
import select
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from flexkv_sglang import threads
from flexkv_sglang.errors import TierUnavailableError
from flexkv_sglang.threads import DiskThread, JobPool, JobThread, PeriodicThread, wait_for

SOON_S = 10.0


def _ended(thread: PeriodicThread) -> bool:
    thread.stop()
    return thread.join(time.monotonic() + SOON_S)


def test_a_step_is_repeated_after_the_seconds_it_returns_and_at_once_when_the_event_is_set() -> (
    None
):
    steps = threading.Semaphore(0)

    def step() -> float:
        steps.release()
        return 3600.0

    thread = PeriodicThread("flexkv-test", step, lambda: None)
    thread.start()
    assert steps.acquire(timeout=SOON_S)
    assert not steps.acquire(timeout=0.05), "the next step is due in an hour"
    thread.event.set()
    assert steps.acquire(timeout=SOON_S)
    assert _ended(thread)


def test_a_step_that_raises_is_counted_and_logged_and_the_thread_goes_on(
    caplog: pytest.LogCaptureFixture,
) -> None:
    steps, failures = threading.Semaphore(0), []

    def step() -> float:
        steps.release()
        raise ValueError("bad")

    thread = PeriodicThread("flexkv-test", step, lambda: failures.append(1), retry_s=0.0)
    thread.start()
    for _ in range(3):
        assert steps.acquire(timeout=SOON_S)
    assert _ended(thread)
    assert len(failures) >= 2
    (record,) = caplog.records
    assert record.getMessage() == "flexkv: flexkv-test failed and goes on"
    assert record.levelno == logging.ERROR
    assert record.exc_info is not None


def test_a_thread_that_is_stopped_before_its_first_step_does_none() -> None:
    steps: list[int] = []
    thread = PeriodicThread(
        "flexkv-test", lambda: float(steps.append(1) or 0), lambda: None, first_s=3600.0
    )
    thread.start()
    assert thread.is_alive()
    assert _ended(thread)
    assert not steps


def test_a_pause_within_a_step_ends_at_stop_and_a_join_ends_at_its_deadline() -> None:
    inside, free = threading.Event(), threading.Event()

    def step() -> float:
        inside.set()
        thread.pause(3600.0)
        assert thread.stopped
        free.wait(SOON_S)
        return 0.0

    thread = PeriodicThread("flexkv-test", step, lambda: None)
    assert thread.join(0.0), "a thread that was not started has ended"
    thread.start()
    assert inside.wait(SOON_S)
    thread.stop()
    assert not thread.join(time.monotonic() + 0.02)
    free.set()
    assert thread.join(time.monotonic() + SOON_S)


def test_jobs_run_in_their_order_within_the_context_and_a_failed_one_is_handed_over() -> None:
    done: list[object] = []

    @contextmanager
    def within() -> Iterator[None]:
        done.append("enter")
        yield
        done.append("leave")

    def work(job: int) -> None:
        if job == 2:
            raise ValueError(job)
        done.append(job)

    thread = JobThread[int](
        "flexkv-test", work, lambda job, exc: done.append((job, type(exc))), within
    )
    assert all(thread.put(job) for job in (1, 2, 3))
    assert thread.wait_idle(SOON_S)
    assert thread.stop(SOON_S)
    assert thread.stop(0.0), "idempotent"
    assert done == ["enter", 1, (2, ValueError), 3, "leave"]
    assert not thread.put(4)


def test_stop_drops_the_jobs_that_wait_and_does_not_wait_longer_than_told() -> None:
    begun, free, done = threading.Event(), threading.Event(), []

    def work(job: int) -> None:
        begun.set()
        free.wait(SOON_S)
        done.append(job)

    thread = JobThread[int]("flexkv-test", work, lambda job, exc: None)
    thread.put(1)
    thread.put(2)
    assert begun.wait(SOON_S)
    assert not thread.wait_idle(0.02)
    assert not thread.stop(0.02)
    free.set()
    assert thread.stop(SOON_S)
    assert done == [1]


def _collect(pool: JobPool, count: int) -> None:
    end = time.monotonic() + SOON_S
    while count:
        assert select.select([pool.fd], [], [], max(0.0, end - time.monotonic()))[0]
        for then in pool.results():
            then()
            count -= 1


def test_a_pool_takes_depth_jobs_until_their_results_are_collected() -> None:
    done: list[str] = []

    def job(name: str) -> Callable[[], Callable[[], None]]:
        return lambda: lambda: done.append(name)

    def bad() -> Callable[[], None]:
        raise ValueError

    pool = JobPool("flexkv-test", 2)
    assert pool.results() == []
    assert pool.put(job("a"), lambda: done.append("not this"))
    assert pool.put(bad, lambda: done.append("failed"))
    assert not pool.has_room
    assert not pool.put(job("c"), lambda: None)
    _collect(pool, 2)
    assert pool.put(job("d"), lambda: None)
    _collect(pool, 1)
    assert done == ["a", "failed", "d"]
    assert pool.close()


def test_a_report_that_raises_ends_no_thread(caplog: pytest.LogCaptureFixture) -> None:
    steps, jobs = threading.Semaphore(0), threading.Semaphore(0)

    def broken(*_: object) -> None:
        raise RuntimeError("the callback is broken as well")

    def step() -> float:
        steps.release()
        raise ValueError("bad")

    def work(_job: int) -> None:
        jobs.release()
        raise ValueError("bad")

    periodic = PeriodicThread("flexkv-test", step, broken, retry_s=0.0)
    periodic.start()
    thread = JobThread[int]("flexkv-test", work, broken)
    for job in range(3):
        assert thread.put(job)
        assert steps.acquire(timeout=SOON_S)
        assert jobs.acquire(timeout=SOON_S)
    assert _ended(periodic)
    assert thread.stop(SOON_S)
    assert "the report of a failure failed" in caplog.text


def test_a_job_may_stop_its_own_thread() -> None:
    answers: list[bool] = []
    thread: JobThread[int]

    def work(_job: int) -> None:
        answers.append(thread.stop(SOON_S))

    thread = JobThread[int]("flexkv-test", work, lambda job, exc: None)
    thread.put(1)
    assert thread.stop(SOON_S)
    assert answers in ([True], [])
    assert not thread.put(2)


def test_a_job_that_hangs_is_noticed_and_its_caller_goes_at_his_deadline(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(threads, "OVERDUE_S", 0.05)
    disk, free, begun = DiskThread("flexkv-test"), threading.Event(), threading.Event()
    assert disk.run(lambda: 7, time.monotonic() + SOON_S) == 7
    stuck = disk.post(lambda: (begun.set(), free.wait(SOON_S))[1], 0.01)
    assert begun.wait(SOON_S)
    with pytest.raises(TierUnavailableError, match="does not answer"):
        disk.run(lambda: 8, time.monotonic() + 0.02)
    end = time.monotonic() + SOON_S
    while not disk.hangs(time.monotonic()):
        assert time.monotonic() < end
        time.sleep(0.005)
    waiting = disk.post(lambda: 9, 1.0)
    disk.refuse()
    assert waiting.cancelled()
    assert disk.post(lambda: 10, 1.0).cancelled(), "nothing is taken"
    assert not stuck.done()
    assert not disk.idle
    free.set()
    assert stuck.result(SOON_S) is True
    disk.accept()
    assert disk.run(lambda: 11, time.monotonic() + SOON_S) == 11
    assert disk.stop(time.monotonic() + SOON_S)
    assert disk.post(lambda: 12, 1.0).cancelled()


def test_a_jobs_error_reaches_its_caller_and_not_the_thread() -> None:
    disk = DiskThread("flexkv-test")

    def bad() -> None:
        raise TimeoutError("of the file system, not of the wait")

    with pytest.raises(TimeoutError, match="of the file system"):
        disk.run(bad, time.monotonic() + SOON_S)
    failed, done = disk.post(bad, 1.0), disk.post(lambda: 1, 1.0)
    assert wait_for([failed, done], time.monotonic() + SOON_S)
    assert (threads.succeeded(failed), threads.succeeded(done)) == (False, True)
    assert disk.stop(time.monotonic() + SOON_S)


def test_a_thread_that_hangs_takes_64_jobs_and_no_more() -> None:
    disk, free, begun = DiskThread("flexkv-test"), threading.Event(), threading.Event()
    disk.post(lambda: (begun.set(), free.wait(SOON_S)), 1.0)
    assert begun.wait(SOON_S)
    jobs = [disk.post(lambda: None, 1.0) for _ in range(70)]
    assert [job.cancelled() for job in jobs] == [False] * 64 + [True] * 6
    free.set()
    assert wait_for(jobs[:64], time.monotonic() + SOON_S)
    assert disk.stop(time.monotonic() + SOON_S)
