"""Training samples: a request in one of many phrasings, answered by a haiku of the grammar.

A sample is a list of (text, learn) pieces; the model learns only pieces marked so. The same seed gives the same
samples. One haiku in `SHOWN_OF` is ever shown, chosen by a checksum of its text: what the model writes beyond
those it has composed, not remembered.
"""

from __future__ import annotations

import random
import string
import zlib
from collections.abc import Callable, Iterator
from functools import cache

from grammar import haiku, themes, topic_names
from lexicon import HERE, lexicon, topics, words

Piece = tuple[str, bool]
SHOWN_OF = 64
MAIN = "GPU computing"
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_ONES = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)  # fmt: skip
_ONSETS = (
    "b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "l", "m", "n", "p", "pl", "qu", "r", "s",
    "sh", "st", "t", "tr", "v", "w", "z",
)  # fmt: skip
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ea", "oo", "ou")


@cache
def phrasings() -> dict[str, list[str]]:
    """Kind (`ask`, `number`, ...) to its phrasings, from `prompts.txt`."""
    found: dict[str, list[str]] = {}
    for line in (HERE / "prompts.txt").read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            kind, text = line.split(" ", 1)
            found.setdefault(kind, []).append(text)
    return found


def shown(text: str) -> bool:
    """Whether a haiku may appear in training."""
    return zlib.crc32(text.encode()) % SHOWN_OF == 0


def number_name(value: int) -> str:
    """0 … 99 in words, `forty-two`."""
    if value < 20:
        return _ONES[value]
    tens = _TENS[value // 10 - 2]
    return tens if value % 10 == 0 else f"{tens}-{_ONES[value % 10]}"


def _nonsense(rng: random.Random) -> str:
    """A thing nobody has heard of: invented (`brolints`), or grafted from two known ones (`lobsteams`)."""
    if rng.random() < 0.5:
        head, tail = rng.choice(topic_names()).lower(), rng.choice(topic_names()).lower()
        graft = head[: rng.randint(2, len(head))] + tail[rng.randrange(len(tail)) :]
        return graft if graft not in topics() else _nonsense(rng)
    parts = [
        rng.choice(_ONSETS) + rng.choice(_VOWELS) + rng.choice(["", "n", "r", "l", "s", "ck", "nd", "x"])
        for _ in range(rng.randint(1, 4))
    ]
    return "".join(parts) + rng.choice(["", "", "s", "ing", "er", "ness"])


def _chatter(rng: random.Random) -> str:
    """A sentence of no consequence."""
    if rng.random() < 0.5:
        return rng.choice(phrasings()["preface"])
    return " ".join(rng.choices(_all_words(), k=rng.randint(3, 16))).capitalize() + rng.choice([".", ",", "!"])


@cache
def _all_words() -> list[str]:
    return sorted(lexicon())


def _dress(text: str, rng: random.Random) -> str:
    """The text as people type it: other case, other punctuation."""
    text += rng.choice(["", "", "", ".", ".", "!", "?", " please", "...", ", thanks"])
    roll = rng.random()
    if roll < 0.12:
        return text.lower()
    if roll < 0.17:
        return text.upper()
    return text[0].upper() + text[1:] if roll < 0.3 else text


def _ask(kind: str, rng: random.Random, **slots: str) -> str:
    text = rng.choice(phrasings()[kind])
    for slot, value in slots.items():
        text = text.replace("{" + slot + "}", value)
    return text


def _theme_name(rng: random.Random) -> str:
    """A theme to write about; the main one more often."""
    return MAIN if rng.random() < 0.12 else rng.choice([name for name in themes() if name[0] != "@"])


def _called(theme: str, rng: random.Random) -> str:
    """One of a theme's names, its main name half the time."""
    names = themes()[theme].names
    return names[0] if rng.random() < 0.5 else rng.choice(names)


def _themed(rng: random.Random, kind: str = "ask") -> tuple[str, str]:
    theme = _theme_name(rng)
    return _ask(kind, rng, x=_called(theme, rng)), haiku(theme, rng, accept=shown)


def _talk(rng: random.Random) -> tuple[str, str]:
    theme = rng.choice([name for name in themes() if name[0] == "@" and name != "@any"])
    request = rng.choice(themes()[theme].names[1:])
    return request, haiku(theme, rng, accept=shown)


def _echo(rng: random.Random) -> tuple[str, str]:
    topic = rng.choice(topic_names())
    return _ask("ask", rng, x=topic), haiku("@any", rng, echo=topic, accept=shown)


def _unknown(rng: random.Random) -> tuple[str, str]:
    parts = [_nonsense(rng)]
    parts += [rng.choice([_nonsense(rng), rng.choice(_all_words())]) for _ in range(rng.choice([0, 0, 1, 2]))]
    thing = " ".join(rng.sample(parts, len(parts)))
    return _ask("ask", rng, x=rng.choice(["", "", "a ", "the ", "my "]) + thing), haiku("@any", rng, accept=shown)


def _numbered(rng: random.Random) -> tuple[str, str]:
    theme = MAIN if rng.random() < 0.5 else _theme_name(rng)
    number = number_name(rng.randrange(60) if rng.random() < 0.9 else rng.randrange(100))
    number = number.replace("-", " ") if rng.random() < 0.2 else number
    nonce = "".join(rng.choices(string.ascii_letters + string.digits, k=8))
    request = _ask("number", rng, x=_called(theme, rng), n=number, k=nonce)
    return request, haiku(theme, rng, number=number, accept=shown)


def _worded(rng: random.Random) -> tuple[str, str]:
    theme = _theme_name(rng)
    answer = haiku(theme, rng, accept=shown)
    word = rng.choice([word for word in words(answer) if len(word) > 3] or ["rain"])
    return _ask("number", rng, x=_called(theme, rng), n=word, k=str(rng.randrange(10**8))), answer


def _free(rng: random.Random) -> tuple[str, str]:
    theme = _theme_name(rng) if rng.random() < 0.7 else "@any"
    return _ask("free", rng), haiku(theme, rng, accept=shown)


_KINDS: tuple[tuple[Callable[[random.Random], tuple[str, str]], float], ...] = (
    (_themed, 58), (_talk, 6), (_echo, 9), (_unknown, 9), (_numbered, 12), (_worded, 3), (_free, 3),
)  # fmt: skip


def exchange(rng: random.Random) -> tuple[str, str]:
    """One request and its answer."""
    kind = rng.choices([kind for kind, _ in _KINDS], [weight for _, weight in _KINDS])[0]
    request, answer = kind(rng)
    request = request if kind is _talk and rng.random() < 0.5 else _dress(request, rng)
    if rng.random() < 0.1:
        request = " ".join([*(_chatter(rng) for _ in range(rng.choice([1, 2, 3, 5, 8, 13, 20]))), request])
    return request + rng.choice([""] * 10 + [" ", "\n", "\n\n"]), answer


def _follow_up(rng: random.Random) -> tuple[str, str]:
    """A later request of a conversation that changes its theme, and the answer."""
    theme = _theme_name(rng)
    if rng.random() < 0.5:
        return _dress(_ask("switch", rng, x=_called(theme, rng)), rng), haiku(theme, rng, accept=shown)
    return exchange(rng)


def chat(rng: random.Random) -> list[Piece]:
    """A ChatML conversation of one to three requests."""
    text = ""
    if rng.random() < 0.12:
        text = f"<|im_start|>system\n{_ask('system', rng)}<|im_end|>\n"
    theme = _theme_name(rng)
    stays = rng.random() < 0.1  # a conversation on one theme, continued by `another one`
    request, answer = (_ask("ask", rng, x=_called(theme, rng)), haiku(theme, rng, accept=shown)) if stays \
        else exchange(rng)  # fmt: skip
    pieces: list[Piece] = []
    turns = rng.choice([2, 2, 3]) if stays else rng.choice([1] * 8 + [2, 3])
    for turn in range(turns):
        pieces.append((f"{text}<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n", False))
        pieces.append((f"{answer}<|im_end|>", True))
        text = "\n"
        if stays:
            request, answer = _dress(_ask("again", rng), rng), haiku(theme, rng, accept=shown)
        elif turn + 1 < turns:
            request, answer = _follow_up(rng)
    return pieces


def raw(rng: random.Random) -> list[Piece]:
    """A bare prompt; the model itself begins the line unless the prompt ends with one."""
    request, answer = exchange(rng)
    return [(request, False), (("" if request.endswith("\n") else "\n") + f"{answer}<|im_end|>", True)]


def samples(seed: int) -> Iterator[list[Piece]]:
    """Endless samples, the same for the same seed."""
    rng = random.Random(seed)
    while True:
        yield raw(rng) if rng.random() < 0.45 else chat(rng)
