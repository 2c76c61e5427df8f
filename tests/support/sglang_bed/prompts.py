"""Prompts for real servers, and where their tokens came from."""

from __future__ import annotations

from flexkv_bed.server import Answer, Replica, reusable_tokens
from flexkv_bed.storage import state, wait_written
from flexkv_bed.tiny_model import VOCAB_SIZE

TOKENS = 600
PAGE = 16
REUSABLE = reusable_tokens(TOKENS, PAGE)


def prompt(seed: int, tokens: int = TOKENS) -> list[int]:
    """Token ids; prompts with another ``seed`` share no page."""
    step = 2 * seed + 3
    return [
        16 + (step * i * i + (seed + 1) * 37 * i + seed) % (VOCAB_SIZE - 16) for i in range(tokens)
    ]


def cold(replica: Replica, seed: int) -> Answer:
    """A new prompt: computed in full, and in storage when this returns."""
    before = state(replica.settings.storage)
    answer = replica.generate(prompt(seed))
    assert answer.device == answer.host == answer.storage == 0
    assert len(set(answer.output_ids)) > 2, "a model that repeats itself proves nothing"
    wait_written(replica.settings.storage, before)
    return answer


def assert_from_storage(replica: Replica, seed: int, expected: Answer) -> None:
    """Every page that SGLang can reuse came from storage, and the answer is the cold one."""
    answer = replica.generate(prompt(seed))
    assert answer.storage == REUSABLE, (answer, replica.log_tail())
    assert answer.output_ids == expected.output_ids


def assert_recomputed(replica: Replica, seed: int, expected: Answer) -> None:
    answer = replica.generate(prompt(seed))
    assert (answer.device, answer.host, answer.storage) == (0, 0, 0)
    assert answer.output_ids == expected.output_ids
