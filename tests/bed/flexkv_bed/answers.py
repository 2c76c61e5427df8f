"""What a server answers, and how much of a prompt it can have had from a cache."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy completion and where the tokens of its prompt came from."""

    output_ids: tuple[int, ...]
    text: str
    prompt_tokens: int
    device: int
    host: int
    storage: int

    @property
    def computed(self) -> int:
        return self.prompt_tokens - self.device - self.host - self.storage


def reusable_tokens(prompt_tokens: int, page_size: int) -> int:
    """What SGLang can take from a cache: whole pages, and at least the last token is always computed."""
    return (prompt_tokens - 1) // page_size * page_size
