"""The haiku grammar: patterns read from `themes/*.txt`, every expansion scanned before it may be used.

A theme file is made of blocks:

    = main name | other names     what a request may call the theme; `@name` marks one the code asks for
    1 a [small|bright] pattern    line 1, 2 or 3; brackets hold alternatives, an empty one may be left out
    --                            ends a scene: lines 1 and 2 agree only within their scene

An expansion is kept when it scans 5, 7 or 5 syllables, so alternatives of different length may stand together.
Line 3 serves all scenes of its theme and stands alone in grammar.
"""

from __future__ import annotations

import itertools
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache

from lexicon import HAIKU, HERE, syllables, topics, words

_BRACKETS = re.compile(r"\[([^\]]*)\]")
_CLUMSY = re.compile(r"\b(a [aeiou]|an [^aeiou]|(the|a|an|my|your|one) (the|a|an|my|your|one|its|of)\b)", re.I)
_ASKS = re.compile(r"(who|why|which|was|is) |(what|where) (is|was|did|shall|moon|rain|wind)\b", re.I)
_JOINERS = {"and", "then", "but", "while", "before", "until", "as", "where", "so", "like", "yet"}
_PAUSES = (" —", ".", ";")
_COMMON = {"with", "from", "into", "then", "that", "what", "this", "they", "your", "over", "some", "just"}


@dataclass(frozen=True)
class Pool:
    """Lines to draw from: a pattern first, by the root of its size, then one of its expansions."""

    groups: tuple[tuple[str, ...], ...]
    weights: tuple[float, ...]  # running sums

    def draw(self, rng: random.Random) -> str:
        return rng.choice(rng.choices(self.groups, cum_weights=self.weights)[0])

    def __len__(self) -> int:
        return sum(map(len, self.groups))


@dataclass
class Theme:
    names: list[str]
    scenes: list[tuple[Pool, Pool]] = field(default_factory=list)
    closers: Pool = field(default_factory=lambda: pool([], 2))

    @property
    def size(self) -> int:
        """How many distinct haiku the theme can make, punctuation aside."""
        return sum(len(first) * len(second) for first, second in self.scenes) * len(self.closers)


def tidy(line: str) -> str:
    """Single spaces, none before punctuation, and one mark where two meet."""
    line = re.sub(r"\s+", " ", line).strip(" ")
    line = re.sub(r" ([,;:.?])", r"\1", line)
    line = re.sub(r"[,;:]+([,;:?.])", r"\1", line)
    return re.sub(r"^[,;: ]+", "", line)


def expand(pattern: str, target: int) -> tuple[str, ...]:
    """All tidy expansions that scan to `target` syllables and put no article wrong, in order, each once."""
    parts = _BRACKETS.split(pattern)
    choices = [part.split("|") if index % 2 else [part] for index, part in enumerate(parts)]
    lines = (tidy("".join(choice)) for choice in itertools.product(*choices))
    fitting = (line for line in lines if syllables(line) == target and not _CLUMSY.search(line))
    return tuple(dict.fromkeys(fitting))


def pool(patterns: list[str], position: int) -> Pool:
    """The pool of line `position` (0, 1, 2); patterns without a fitting expansion drop out."""
    groups = tuple(group for pattern in patterns if (group := expand(pattern, HAIKU[position])))
    return Pool(groups, tuple(itertools.accumulate(len(group) ** 0.5 for group in groups)))


def _theme(block: str) -> Theme:
    title, *lines = block.strip().splitlines()
    theme = Theme([name.strip() for name in title.split("|")])
    scenes: list[list[list[str]]] = [[[], []]]
    closers: list[str] = []
    for line in filter(None, lines):
        if line == "--":
            scenes.append([[], []])
        elif line[0] == "3":
            closers.append(line[2:])
        else:
            scenes[-1][int(line[0]) - 1].append(line[2:])
    theme.scenes = [(pool(first, 0), pool(second, 1)) for first, second in scenes]
    theme.closers = pool(closers, 2)
    return theme


@cache
def blocks() -> dict[str, str]:
    """Main name to the text of its block, over all theme files in name order."""
    text = "\n".join(path.read_text(encoding="utf-8") for path in sorted((HERE / "themes").glob("*.txt")))
    found = [block for block in re.split(r"^= ", text, flags=re.M) if block.strip()]
    return {block.splitlines()[0].split("|")[0].strip(): block for block in found}


@cache
def themes() -> dict[str, Theme]:
    """Every theme but the two that need a word filled in."""
    return {name: _theme(block) for name, block in blocks().items() if name not in ("@echo", "@number")}


@cache
def _fills(name: str, slot: str, value: str) -> Pool:
    """The lines of theme `name` with `value` in its slot."""
    lines = [line for line in blocks()[name].splitlines()[1:] if line]
    return pool([line[2:].replace(slot, value) for line in lines], int(lines[0][0]) - 1)


def _repeats(lines: list[str]) -> bool:
    """Whether a telling word comes twice."""
    telling = [word for line in lines for word in words(line) if len(word) > 3 and word not in _COMMON]
    return len(set(telling)) < len(telling)


def _clash(number: str, lines: list[str]) -> bool:
    """Whether a word of the number stands in another line too."""
    return bool(set(words(number)) & set(words(" ".join(lines[:2]))))


def _join(lines: list[str], rng: random.Random) -> str:
    """Three lines to one text: a pause before the turn, capitals where sentences begin."""
    first, second, third = lines
    pause = "," if third.split(" ", 1)[0] in _JOINERS else rng.choice(_PAUSES)
    third = third[0].upper() + third[1:] if pause == "." else third
    end = "?" if _ASKS.match(third) else "."
    return f"{first[0].upper()}{first[1:]}\n{second}{pause}\n{third.rstrip('.?')}{end}"


def haiku(
    theme: str, rng: random.Random, echo: str = "", number: str = "", accept: Callable[[str], bool] = bool
) -> str:
    """One haiku of a theme that `accept` takes.

    `echo` puts a topic in the first line, `number` a number in the last. Raises KeyError for an unknown theme.
    """
    source = themes()[theme]
    while True:
        first, second = rng.choice(source.scenes)
        openings = _fills("@echo", "{x}", echo) if echo else first
        closers = _fills("@number", "{n}", number) if number else source.closers
        if not number and not theme.startswith("@") and rng.random() < 0.1:
            closers = themes()["@any"].closers
        lines = [openings.draw(rng), second.draw(rng), closers.draw(rng)]
        text = _join(lines, rng)
        if accept(text) and not _repeats(lines) and not _clash(number, lines):
            return text


def topic_names() -> list[str]:
    return sorted(topics())
