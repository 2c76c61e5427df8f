"""Answers of a server, and the part of a prompt that it can take from a cache."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Answer:
    """One greedy completion and the sources of its prompt's tokens."""

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
    """Tokens that SGLang can take from a cache: whole pages, never the last token."""
    return (prompt_tokens - 1) // page_size * page_size
