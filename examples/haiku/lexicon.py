"""Syllables: counted from a word list, never guessed.

`lexicon.txt` gives one spoken count for every word the grammar may use, `topics.txt` for things a request may
name. Hyphens separate words, so `forty-two` is counted as `forty two`.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path

HERE = Path(__file__).resolve().parent
HAIKU = (5, 7, 5)
_WORD = re.compile(r"[A-Za-z]+(?:'[A-Za-z]+)?")
_NOISE = re.compile(r"[A-Za-z' ,.;:?!—-]*")


def words(line: str) -> list[str]:
    """The words of a line, lower-cased, without punctuation."""
    return [word.lower() for word in _WORD.findall(line)]


def _rows(name: str) -> list[tuple[int, str]]:
    """(count, rest of line) for every line of a data file that is no comment."""
    lines = (HERE / name).read_text(encoding="utf-8").splitlines()
    split = [line.split(" ", 1) for line in lines if line and not line.startswith("#")]
    return [(int(count), rest) for count, rest in split]


@cache
def topics() -> dict[str, int]:
    """Every thing a request may name beside the themes, with its syllables."""
    return {topic: count for count, rest in _rows("topics.txt") for topic in rest.split("; ")}


@cache
def lexicon() -> dict[str, int]:
    """Word to syllable count. Raises ValueError when two entries disagree."""
    pairs = [(word, count) for count, rest in _rows("lexicon.txt") for word in rest.split()]
    pairs += [(topic.lower(), count) for topic, count in topics().items()]
    counts: dict[str, int] = {}
    for word, count in pairs:
        if counts.setdefault(word, count) != count:
            raise ValueError(f"lexicon: {word!r} is counted {counts[word]} and {count}; keep one")
    return counts


def syllables(line: str) -> int:
    """Syllables of a line. Raises KeyError, naming the word, when one is not in the lexicon."""
    table = lexicon()
    return sum(table[word] for word in words(line))


def is_haiku(text: str) -> bool:
    """Whether text is exactly three lines of known words that scan 5-7-5."""
    lines = text.split("\n")
    if len(lines) != len(HAIKU) or not all(_NOISE.fullmatch(line) for line in lines):
        return False
    try:
        return tuple(syllables(line) for line in lines) == HAIKU
    except KeyError:
        return False
