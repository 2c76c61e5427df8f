"""Log lines that README, docs/*.md and the texts of ``flexkv doctor`` quote are lines that the product writes."""

from __future__ import annotations

import ast
import functools
import itertools
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from flexkv_sglang.config.settings import FlexKVConfig

ROOT = Path(__file__).parents[2]
PRODUCT = ("flexkv_sglang", "backends", "triton_kernels")
GAP = "\0"
"""A place for a value, in a quote or in a format."""

VALUE = r"%[-+.\d]*[a-z]"
QUOTE_IN_DOCS = re.compile(r"`(flexkv: [^`]+)`")
QUOTE_IN_TEXTS = re.compile(r"'(flexkv: [^']+)'")


def sources(*folders: str) -> Iterator[ast.Module]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield ast.parse(path.read_text())


@functools.cache
def formats() -> tuple[str, ...]:
    """Texts of the product that begin like a log line, values as ``GAP``, and the line with the effective settings.

    Texts among the arguments of a log call are put in their place.
    """
    found = [f"flexkv: {FlexKVConfig().describe()}"]
    for tree in sources(*PRODUCT):
        for node in ast.walk(tree):
            found += texts_of(node)
            if isinstance(node, ast.Call):
                for line in texts_of(node.args[0]) if node.args else []:
                    found += filled(line, node.args[1:])
    lines = {re.sub(VALUE, GAP, line) for line in found if line.startswith("flexkv: ")}
    return tuple(with_gaps(line) for line in sorted(lines))


def texts_of(node: ast.AST) -> list[str]:
    """The text of a constant or an f-string; both texts of a choice between two."""
    if isinstance(node, ast.IfExp):
        return [*texts_of(node.body), *texts_of(node.orelse)]
    if isinstance(node, ast.JoinedStr):
        return ["".join((texts_of(part) or [GAP])[0] for part in node.values)]
    return [node.value] if isinstance(node, ast.Constant) and isinstance(node.value, str) else []


def filled(line: str, values: list[ast.expr]) -> Iterator[str]:
    """The format ``line`` with each choice of texts among its values."""
    pieces = re.split(VALUE, line)
    if not line.startswith("flexkv: ") or len(pieces) != len(values) + 1:
        return
    for chosen in itertools.product(*(texts_of(value) or [GAP] for value in values)):
        yield "".join(itertools.chain(*zip(pieces, (*chosen, ""), strict=True)))


def with_gaps(line: str) -> str:
    """``...``, ``<owner>``, ``N`` and values behind ``=`` stand for values."""
    line = re.sub(r"\.\.\.|<[^>]*>|\b[NM]\b", GAP, line)
    return re.sub(r"(?<==)[^\s=\[\];]+", GAP, line)


def is_written(quote: str, lines: tuple[str, ...]) -> bool:
    """True if one line has every piece of the quote, in this order, from its start on."""
    pieces = [re.escape(piece) for piece in with_gaps(quote).split(GAP)]
    pattern = re.compile(".*".join(pieces))
    return any(pattern.match(line) for line in lines)


def quotes_in_docs() -> list[str]:
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
    return sorted({quote for page in pages for quote in QUOTE_IN_DOCS.findall(page.read_text())})


def quotes_in_texts() -> list[str]:
    texts = [
        node.value
        for tree in sources("flexkv_sglang/cli")
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    ]
    return sorted({quote for text in texts for quote in QUOTE_IN_TEXTS.findall(text)})


def test_the_comparison_tells_a_wrong_line_from_a_right_one() -> None:
    lines = formats()
    assert len(lines) > 40
    assert is_written("flexkv: tiers=[path=... size=...] verify=...", lines)
    assert not is_written("flexkv: path=... size=... verify=...", lines)
    assert not is_written("flexkv: <dir> is avoided", lines)


@pytest.mark.parametrize("quote", quotes_in_docs())
def test_docs_quote_lines_that_are_written(quote: str) -> None:
    assert is_written(quote, formats())


@pytest.mark.parametrize("quote", quotes_in_texts())
def test_the_doctor_quotes_lines_that_are_written(quote: str) -> None:
    assert is_written(quote, formats())


def test_there_are_quotes() -> None:
    assert len(quotes_in_docs()) > 15
    assert len(quotes_in_texts()) >= 3
