"""TextStream: the same text whatever the tokens, never half a character, nothing of a stop string."""

from __future__ import annotations

import time
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from worker_orcd.tokenizer.stream import TextStream


class Pieces:
    """A tokenizer whose token i is the i-th piece of bytes."""

    def __init__(self, pieces: list[bytes]) -> None:
        self.pieces = pieces

    def token_bytes(self, token_id: int) -> bytes:
        return self.pieces[token_id]


def _stream(pieces: list[bytes], stop: tuple[str, ...] = ()) -> tuple[list[str], str | None]:
    """What each token showed and what the end did; the stop string matched."""
    stream = TextStream(Pieces(pieces), stop)
    shown = [stream.push(i) for i in range(len(pieces))]
    return [*shown, stream.finish()], stream.matched


def _expected(text: str, stop: tuple[str, ...]) -> tuple[str, str | None]:
    """Character by character: the first stop string that the text ends with, the longest of several."""
    for end in range(1, len(text) + 1):
        matches = [s for s in stop if text[:end].endswith(s)]
        if matches:
            longest = max(matches, key=len)
            return text[: end - len(longest)], longest
    return text, None


@given(st.lists(st.binary(max_size=5), max_size=20))
def test_any_bytes_in_any_tokens_give_the_text_of_the_whole(pieces: list[bytes]) -> None:
    shown, _ = _stream(pieces)
    assert "".join(shown) == b"".join(pieces).decode("utf-8", "replace")


@pytest.mark.parametrize("text", ["古池や", "👩‍👩‍👧‍👦🏽", "العربية", "e\u0301क्षि", "a古😀b"], ids=ascii)
def test_every_split_shows_whole_characters_only(text: str) -> None:
    data = text.encode()
    for first in range(len(data) + 1):
        for second in range(first, len(data) + 1):
            shown, _ = _stream([data[:first], data[first:second], data[second:]])
            assert "".join(shown) == text
            assert all(text.startswith("".join(shown[: i + 1])) for i in range(len(shown)))
    shown, _ = _stream([bytes([byte]) for byte in data])
    assert "".join(shown) == text
    assert all(len(piece) <= 1 for piece in shown)


def test_text_without_stop_strings_is_never_held_back() -> None:
    assert _stream([b"a", b"b c", "é".encode()]) == (["a", "b c", "é", ""], None)


def test_invalid_bytes_are_replaced_when_that_is_certain() -> None:
    assert _stream([b"a\xff", b"\xe5", b"b"])[0] == ["a\ufffd", "", "\ufffdb", ""]
    assert _stream([b"a\xe5\x8f"])[0] == ["a", "\ufffd"], "an unfinished character at the end"


@pytest.mark.parametrize(
    ("pieces", "stop", "shown", "matched"),
    [
        ([b"one ST", b"OP two"], ("STOP",), ["one ", "", ""], "STOP"),
        ([b"one ST", b"AR two"], ("STOP",), ["one ", "STAR two", ""], None),
        ([b"S", b"S", b"T", b"O", b"P"], ("STOP",), ["", "S", "", "", "", ""], "STOP"),
        ([b"abcx"], ("abcx", "bc"), ["a", ""], "bc"),
        ([b"abc"], ("abc", "bc"), ["", ""], "abc"),
        ([b"ab", b"c"], ("abcd", "bc"), ["", "a", ""], "bc"),
        ([b"end ST"], ("STOP",), ["end ", "ST"], None),
        (["\n古".encode()[:2], "\n古".encode()[2:], "池".encode()], ("古池",), ["\n", "", "", ""], "古池"),
        ([b"\n", b"\n", b"x"], ("\n\n",), ["", "", "", ""], "\n\n"),
        ([b"a\xe5"], ("\ufffd",), ["a", ""], "\ufffd"),
    ],
)  # fmt: skip
def test_stop_strings(pieces: list[bytes], stop: tuple[str, ...], shown: list[str], matched: str | None) -> None:
    assert _stream(pieces, stop) == (shown, matched)


@given(
    st.text(st.sampled_from("ab古\n"), max_size=30),
    st.lists(st.text(st.sampled_from("ab古\n"), min_size=1, max_size=4), max_size=4),
    st.lists(st.integers(0, 80), max_size=30),
)
def test_stop_strings_do_not_depend_on_the_tokens(text: str, stops: list[str], cuts: list[int]) -> None:
    data = text.encode()
    places = sorted({0, len(data), *(cut for cut in cuts if cut < len(data))})
    pieces = [data[start:end] for start, end in pairwise(places)]
    shown, matched = _stream(pieces, tuple(stops))
    assert ("".join(shown), matched) == _expected(text, tuple(stops))


def test_no_more_is_held_than_could_become_a_stop_string() -> None:
    stream = TextStream(Pieces([b"a", b"b"]), ("aab",))
    assert [stream.push(0), stream.push(0), stream.push(0), stream.push(0)] == ["", "", "a", "a"]


def test_nothing_is_shown_after_a_stop_string() -> None:
    stream = TextStream(Pieces([b"xSTOP", b"more"]), ("STOP",))
    assert [stream.push(0), stream.push(1), stream.finish()] == ["x", "", ""]


def test_a_token_costs_the_same_after_many() -> None:
    """A hundred thousand tokens, a quarter of a million characters held or shown: no look back at what was shown."""
    stream = TextStream(Pieces([b"ab"]), ("abx", "b" * 500))
    start = time.perf_counter()
    total = sum(len(stream.push(0)) for _ in range(100_000)) + len(stream.finish())
    assert total == 200_000
    assert time.perf_counter() - start < 10
