"""Special tokens spelled in a text: where they are, before the rest is tokenized."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

from worker_orcd.tokenizer.vocabulary import TokenType, Vocabulary

_WHITESPACE: Final = re.compile(r"[ \t\n\v\f\r]*")


class SpecialTokens:
    """Finds special tokens in text: the left-most first, and of those starting there the longest.

    Control tokens are found on demand only, user-defined ones always. Padding rows are nobody's text.
    After a token of `right_strip` the whitespace belongs to the token.
    """

    def __init__(self, vocabulary: Vocabulary, right_strip: frozenset[int] = frozenset()) -> None:
        hidden = frozenset(vocabulary.unsampleable)
        control = vocabulary.control - hidden
        user_defined = frozenset(vocabulary.of_type(TokenType.USER_DEFINED)) - hidden - control
        self._right_strip = right_strip
        tokens = vocabulary.tokens
        self._every = _Finder.of({tokens[i]: i for i in control | user_defined})
        self._user_defined = _Finder.of({tokens[i]: i for i in user_defined})

    def split(self, text: str, parse_special: bool) -> Iterator[str | int]:
        """The text as non-empty strings and, between them, ids of special tokens."""
        finder = self._every if parse_special else self._user_defined
        start = 0
        for begin, end, token_id in finder.find(text):
            if begin > start:
                yield text[start:begin]
            yield token_id
            start = end
            if token_id in self._right_strip:
                start = _match_end(_WHITESPACE, text, end)
        if start < len(text):
            yield text[start:]


@dataclass(frozen=True)
class _Finder:
    """Candidates by their first two characters: quicker to build and to run than one pattern of all texts."""

    ids: dict[str, int]
    lengths: dict[str, list[int]]  # prefix → lengths of the candidates, longest first
    prefixes: re.Pattern[str] | None

    @classmethod
    def of(cls, ids: dict[str, int]) -> _Finder:
        lengths: dict[str, set[int]] = {text[:2]: set() for text in ids}
        for text in ids:
            lengths[text[:2]].add(len(text))
        for prefix, candidates in lengths.items():
            if prefix[:1] in ids:
                candidates.add(1)
        ordered = sorted(lengths, key=len, reverse=True)
        pattern = re.compile("|".join(map(re.escape, ordered))) if ids else None
        return cls(ids, {prefix: sorted(lengths[prefix], reverse=True) for prefix in ordered}, pattern)

    def find(self, text: str) -> Iterator[tuple[int, int, int]]:
        """(begin, end, id) of every special token, left to right without overlap."""
        position = 0
        while self.prefixes and (match := self.prefixes.search(text, position)):
            begin = position = match.start()
            position += 1
            for length in self.lengths[match[0]]:
                token_id = self.ids.get(text[begin : begin + length])
                if token_id is not None:
                    position = begin + length
                    yield begin, position, token_id
                    break


def _match_end(pattern: re.Pattern[str], text: str, start: int) -> int:
    match = pattern.match(text, start)
    assert match is not None, "the pattern matches the empty string"
    return match.end()
