"""Stock SGLang servers in its other modes: write and prefetch policies, staging-only host memory, injected failures.

Policies are changed on a running server (``PUT`` of the attached backend's name does no more than that).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flexkv_bed.server import Answer, Replica, ServerFailedError, Settings
from flexkv_bed.storage import state, wait_written
from sglang_bed.prompts import PAGE, REUSABLE, assert_from_storage, assert_recomputed, cold, prompt
from stores.engines import wait_until

pytestmark = [pytest.mark.sglang, pytest.mark.e2e]

PAGES = REUSABLE // PAGE
DEVICE_PROMPTS = 7  # 600 tokens each; the device pool holds 4096


@pytest.fixture(scope="module")
def replica(tmp_path_factory: pytest.TempPathFactory, model: Path) -> Iterator[Replica]:
    work = tmp_path_factory.mktemp("modes")
    arguments = ("--admin-api-key", "bed", "--enable-metrics")
    made = Replica(
        Settings(model=model, storage=work / "pages", log=work / "log", arguments=arguments)
    )
    with made:
        made.wait_ready()
        yield made


def test_write_through_selective_writes_what_is_asked_for_again(replica: Replica) -> None:
    replica.set_policies(write="write_through_selective")
    try:
        before = state(replica.settings.storage)
        first = replica.generate(prompt(1))
        assert replica.generate(prompt(1)).output_ids == first.output_ids
        wait_written(replica.settings.storage, before)
        replica.generate(prompt(2))
        replica.flush_cache()
        assert_from_storage(replica, 1, first)
        assert replica.generate(prompt(2)).storage == 0
    finally:
        replica.flush_cache()
        replica.set_policies(write="write_through")


def test_write_back_writes_what_is_evicted(replica: Replica) -> None:
    replica.flush_cache()
    replica.set_policies(write="write_back")
    try:
        before = state(replica.settings.storage)
        first = replica.generate(prompt(10))
        for seed in range(11, 11 + DEVICE_PROMPTS):
            replica.generate(prompt(seed))
        wait_written(replica.settings.storage, before)
        replica.flush_cache()
        assert_from_storage(replica, 10, first)
        assert replica.generate(prompt(10 + DEVICE_PROMPTS)).storage == 0  # was never evicted
    finally:
        replica.flush_cache()
        replica.set_policies(write="write_through")


@pytest.mark.parametrize("policy", ["timeout", "best_effort", "wait_complete"])
def test_prefetch_policies(replica: Replica, policy: str) -> None:
    """``best_effort`` waits for nothing: what has arrived is used, and the answer is the same."""
    seed = 30 + len(policy)
    first = cold(replica, seed)
    replica.set_policies(prefetch=policy)
    try:
        replica.flush_cache()
        answer = replica.generate(prompt(seed))
        assert answer.output_ids == first.output_ids
        assert answer.storage % PAGE == 0
        assert answer.storage == REUSABLE or policy == "best_effort"
    finally:
        replica.set_policies(prefetch="wait_complete")


def test_sglangs_histograms_count_what_we_moved(replica: Replica) -> None:
    """``get_stats`` is drained while requests are served, so the next request publishes the last one's transfers."""
    names = ["sglang:prefetch_pgs_sum", "sglang:backup_pgs_sum"]
    before = [replica.metric(name) for name in names]
    first = cold(replica, 50)
    replica.flush_cache()
    assert_from_storage(replica, 50, first)
    assert wait_until(
        lambda: (
            [replica.metric(name) - old for name, old in zip(names, before, strict=True)]
            == [PAGES, PAGES]
        )
    )
    for name in ("sglang:prefetch_bandwidth", "sglang:backup_bandwidth"):
        assert replica.metric(name + "_sum") > 0


def test_host_memory_as_a_staging_buffer_only(tmp_path: Path, model: Path) -> None:
    """``buffer_only``: nothing stays in host memory, so every page that left the device comes from storage.

    ``write_back`` becomes ``write_through`` there.
    """
    settings = Settings(
        model=model,
        storage=tmp_path / "pages",
        log=tmp_path / "log",
        arguments=(
            *("--admin-api-key", "bed", "--hicache-host-memory-mode", "buffer_only"),
            *("--hicache-write-policy", "write_back"),
        ),
    )
    with Replica(settings) as replica:
        replica.wait_ready()
        first = cold(replica, 1)
        for seed in range(2, 2 + DEVICE_PROMPTS):
            replica.generate(prompt(seed))
        assert_from_storage(replica, 1, first)
        replica.flush_cache()
        assert_from_storage(replica, 1, first)
        replica.flush_cache()
        replica.clear_storage()
        assert_recomputed(replica, 1, first)
        replica.terminate()
    assert "Traceback" not in replica.log_text()


class ReadPriority:
    """Two clients that repeat a few prompts until the block is left, and note every answer that differs."""

    def __init__(self, replica: Replica, expected: dict[int, Answer]) -> None:
        self._replica, self._expected = replica, expected
        self._done = threading.Event()
        self._go = threading.Event()
        self._go.set()
        self._threads = [threading.Thread(target=self._client, args=(i,)) for i in range(2)]
        self.problems: list[str] = []
        self.from_storage = 0

    def __enter__(self) -> ReadPriority:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._done.set()
        self._go.set()
        for thread in self._threads:
            thread.join()

    def change(self, action: Callable[[], str]) -> None:
        """Detach or attach. Both are refused unless no request happens to run: then the clients wait."""
        if not until_idle(action, tries=20):
            with self.paused():
                assert until_idle(action, tries=2000), "never idle"

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No new requests meanwhile."""
        self._go.clear()
        try:
            yield
        finally:
            self._go.set()

    def _client(self, number: int) -> None:
        seeds = list(self._expected)[number::2]
        while not self._done.is_set():
            for seed in seeds:
                self._go.wait()
                try:
                    answer = self._replica.generate(prompt(seed))
                except ServerFailedError as exc:
                    self.problems.append(str(exc))
                    return
                self.from_storage += answer.storage
                if answer.output_ids != self._expected[seed].output_ids:
                    self.problems.append(f"prompt {seed}: {answer}")


def test_injected_failures_and_delays_with_detach_and_attach_under_traffic(
    tmp_path: Path, model: Path
) -> None:
    """SGLang's own injector around us. A page that fails is recomputed, never wrong, and nothing hangs.

    Both caches above are flushed between detach and attach, so that pages have to come from storage.
    """
    settings = Settings(
        model=model,
        storage=tmp_path / "pages",
        log=tmp_path / "log",
        arguments=("--admin-api-key", "bed", "--enable-metrics"),
        environment={
            "SGLANG_TEST_HICACHE_BACKEND_RANDOM_FAILURE": "0.3",
            "SGLANG_TEST_HICACHE_BACKEND_RANDOM_DELAY": "0.05",
        },
    )
    with Replica(settings) as replica:
        replica.wait_ready()
        assert "HiCache storage test injector enabled" in replica.log_text()
        expected = {seed: replica.generate(prompt(seed)) for seed in range(8)}
        with ReadPriority(replica, expected) as traffic:
            for _ in range(2):
                traffic.change(replica.detach)
                with traffic.paused():
                    replica.flush_cache()
                traffic.change(lambda: replica.attach("flexkv", settings.extra_config()))
            assert wait_until(lambda: traffic.from_storage > 0 or bool(traffic.problems), 60)
        assert not traffic.problems, traffic.problems[0]
        replica.terminate()
    assert "Traceback" not in replica.log_text()


def until_idle(change: Callable[[], str], tries: int) -> bool:
    """Try until it is not refused."""
    for _ in range(tries):
        try:
            change()
        except ServerFailedError as exc:
            if "HTTP 400" not in str(exc) or "not idle" not in str(exc):
                raise
        else:
            return True
    return False


@pytest.mark.nightly
def test_another_tensor_parallel_size_reads_the_pages(tmp_path: Path, model: Path) -> None:
    """Two ranks write head groups, one rank reads them; the layout ``page_head`` and ``tp_lcm_size`` make it so."""
    pages = tmp_path / "pages"
    extra = {"path": str(pages), "size": "256MiB", "tp_lcm_size": 2}

    def settings(name: str, *arguments: str) -> Settings:
        return Settings(
            model=model,
            storage=pages,
            log=tmp_path / name,
            layout="page_head",
            extra=extra,
            arguments=arguments,
            environment={"SGLANG_CPU_OMP_THREADS_BIND": "0|0"} if arguments else {},
        )

    with Replica(settings("two.log", "--tp-size", "2")) as two:
        two.wait_ready()
        cold(two, 1)
        two.terminate()
    with Replica(settings("one.log")) as one:
        one.wait_ready()
        answer = one.generate(prompt(1))
        assert answer.storage == REUSABLE, one.log_tail()
    assert len(list(pages.glob("*/NAMESPACE.json"))) == 1
