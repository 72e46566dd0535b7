"""The grammar behind the embedded model: every count checked, every sample scans."""

from __future__ import annotations

import importlib
import itertools
import random
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

HAIKU = Path(__file__).parents[2] / "examples" / "haiku"
AMBIGUOUS = "fire hour flower power tower poem quiet every our toward real prayer diamond evening wire tired"


@pytest.fixture(scope="module")
def example() -> Iterator[dict[str, Any]]:
    """The example's modules; they are scripts in one folder, not a package."""
    names = ("lexicon", "grammar", "corpus")
    sys.path.insert(0, str(HAIKU))
    try:
        yield {name: importlib.import_module(name) for name in names}
    finally:
        sys.path.remove(str(HAIKU))
        for name in names:
            sys.modules.pop(name, None)


@pytest.mark.parametrize(
    ("line", "count"),
    [("Ten thousand small threads", 5), ("a kernel unfolds at once", 7), ("lane forty-two glows.", 5), ("", 0)],
)
def test_counts_known_lines(example: dict[str, Any], line: str, count: int) -> None:
    assert example["lexicon"].syllables(line) == count


def test_unknown_word_is_named(example: dict[str, Any]) -> None:
    with pytest.raises(KeyError, match="floccinaucinihil"):
        example["lexicon"].syllables("the floccinaucinihil")


@pytest.mark.parametrize(
    "text",
    [
        "Ten thousand small threads\nweave one image out of light",  # two lines
        "Ten thousand threads\nspin one clear story from sand —\nthe fan hums, content.",  # 4-7-5
        "Ten thousand small threads\nspin one clear stxry from sand —\nthe fan hums, content.",  # no word
    ],
)
def test_is_haiku_refuses(example: dict[str, Any], text: str) -> None:
    assert not example["lexicon"].is_haiku(text)


def test_every_word_has_the_count_the_scanner_gives(example: dict[str, Any]) -> None:
    lexicon = example["lexicon"]
    assert len(lexicon.lexicon()) > 1500
    for word, count in lexicon.lexicon().items():
        assert lexicon.syllables(word) == count, word
        assert 1 <= count <= 4, word


def test_ambiguous_words_are_left_out(example: dict[str, Any]) -> None:
    assert not set(AMBIGUOUS.split()) & set(example["lexicon"].lexicon())


def test_every_theme_can_speak(example: dict[str, Any]) -> None:
    themes = example["grammar"].themes()
    assert sum(name[0] != "@" for name in themes) >= 40
    for name, theme in themes.items():
        assert theme.size > 1000, name
    assert themes["GPU computing"].size > 100_000_000


def test_every_theme_scans(example: dict[str, Any]) -> None:
    grammar, rng = example["grammar"], random.Random(3)
    for name in grammar.themes():
        for _ in range(15):
            text = grammar.haiku(name, rng)
            assert example["lexicon"].is_haiku(text), text


def test_numbers_stand_once_in_the_last_line(example: dict[str, Any]) -> None:
    grammar, corpus, rng = example["grammar"], example["corpus"], random.Random(4)
    for value in range(60):
        number = corpus.number_name(value)
        text = grammar.haiku("GPU computing", rng, number=number)
        assert example["lexicon"].is_haiku(text), text
        assert number in text.lower().splitlines()[2]


def test_topics_stand_in_the_first_line(example: dict[str, Any]) -> None:
    grammar, rng = example["grammar"], random.Random(5)
    for topic in grammar.topic_names()[::20]:
        text = grammar.haiku("@any", rng, echo=topic)
        assert example["lexicon"].is_haiku(text), text
        assert topic.lower() in text.lower().splitlines()[0]


def answers(example: dict[str, Any], seed: int, count: int) -> list[str]:
    drawn = itertools.islice(example["corpus"].samples(seed), count)
    return [text for sample in drawn for text, learn in sample if learn]


def test_samples_are_repeatable_distinct_and_scan(example: dict[str, Any]) -> None:
    first = answers(example, 1, 250)
    assert first == answers(example, 1, 250)
    assert first != answers(example, 2, 250)
    haiku = [text.removesuffix("<|im_end|>").removeprefix("\n") for text in first]
    assert all(map(example["lexicon"].is_haiku, haiku))
    assert all(map(example["corpus"].shown, haiku))
    assert len(set(haiku)) > 0.9 * len(haiku)
