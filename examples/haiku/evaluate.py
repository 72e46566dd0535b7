"""Measure a haiku GGUF with llama.cpp: scan, variety, copies, endings; prints JSON.

    python evaluate.py haiku.gguf [--seeds 100] [--per-theme 10]

`shown` counts answers that training could have held (`corpus.shown`), an upper bound of verbatim copies.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterable
from typing import Any

import corpus
from grammar import themes
from lexicon import is_haiku
from llama_cpp import Llama

PHRASINGS = (
    "Write a haiku about {x}", "haiku about {x}", "Please write me a haiku on {x}.", "WRITE A HAIKU ABOUT {x}!",
    "Could you compose a short poem about {x}?", "tell me about {x}\n", "{x}", "5-7-5 poem, topic {x} ",
    "I would love to read something about {x} today", "What does {x} mean to you?",
)  # fmt: skip
UNHEARD = ("staplers", "my landlord", "Byzantium", "sourdough starters", "a broken elevator", "xylophones")
GENERAL = ("hello", "Who are you?", "Tell me a joke", "What is 2+2?", "thank you!", "help", "why is the sky blue?",
           "Translate 'cat' into French", "def f(x):", "42", "How do I cook rice?", "Good night!")  # fmt: skip
LONG = "Here is a long note about our week, which you may ignore. We met, we talked, we wrote it all down. " * 6


def chatml(*turns: str) -> str:
    """Turns of user and assistant, open for the next answer."""
    roles = itertools.cycle(("user", "assistant"))
    said = "".join(f"<|im_start|>{role}\n{turn}<|im_end|>\n" for role, turn in zip(roles, turns, strict=False))
    return said + "<|im_start|>assistant\n"


class Answers:
    """Answers gathered under a name, and what can be counted of them."""

    def __init__(self, model: Llama) -> None:
        self.model = model
        self.figures: dict[str, Any] = {}
        self.failures: list[tuple[str, str]] = []

    def ask(self, prompt: str, seed: int, temperature: float = 0.7) -> tuple[str, bool]:
        """The answer without its leading line end, and whether it ended by itself."""
        tokens = self.model.tokenize(prompt.encode(), add_bos=False, special=True)
        plain = {"top_p": 1.0, "top_k": 0, "min_p": 0.0, "repeat_penalty": 1.0}
        out = self.model.create_completion(tokens, max_tokens=64, seed=seed, temperature=temperature, **plain)
        choice = out["choices"][0]  # type: ignore[index]
        return choice["text"].removeprefix("\n"), choice["finish_reason"] == "stop"

    def measure(self, name: str, prompts: Iterable[str], temperature: float = 0.7) -> list[str]:
        """Ask all prompts, one seed each; note the share of each virtue in per cent."""
        asked = [(prompt, *self.ask(prompt, seed, temperature)) for seed, prompt in enumerate(prompts)]
        texts = [text for _, text, _ in asked]
        self.failures += [(prompt[-60:], text) for prompt, text, ended in asked if not (ended and is_haiku(text))]
        share = 100 / len(asked)
        self.figures[name] = {
            "answers": len(asked),
            "scan": round(share * sum(map(is_haiku, texts)), 2),
            "ended": round(share * sum(ended for _, _, ended in asked), 2),
            "distinct": round(share * len(set(texts)), 2),
            "shown": round(share * sum(map(corpus.shown, texts)), 2),
        }
        return texts


def report(answers: Answers, seeds: int, per_theme: int) -> dict[str, Any]:
    """All figures."""
    main = "Write a haiku about GPU computing"
    samples = answers.measure("raw", [main] * seeds)[:8]
    answers.measure("chat", [chatml(main)] * seeds)
    names = [name for theme, entry in themes().items() if theme[0] != "@" for name in entry.names]
    mixed = [ask.format(x=name) for name, ask in zip(names, itertools.cycle(PHRASINGS), strict=False)]
    answers.measure("names_raw", mixed)
    answers.measure("names_chat", [chatml(prompt) for prompt in mixed])
    mains = [theme for theme in themes() if theme[0] != "@"]
    answers.measure("themes", [f"Write a haiku about {theme}" for theme in mains for _ in range(per_theme)])
    answers.measure("unheard", [ask.format(x=x) for x in UNHEARD for ask in PHRASINGS])
    general = [form for prompt in GENERAL for form in (prompt, chatml(prompt)) for _ in range(3)]
    answers.measure("general", general)
    first = "Black cup, the window,\nslow storms of steam bloom at dawn.\nHalf gone, and still warm."
    follow = [chatml("haiku about coffee", first, ask) for ask in ("another one", "now about rain", "Thanks!")]
    answers.measure("follow_up", follow * 8)
    answers.measure("long", [LONG + main, chatml(LONG + main)] * 8)
    wanted = [corpus.number_name(n) for n in range(60)]
    prompts = [f'{main} that includes the word "{word}" (nonce: q{n:07d})' for n, word in enumerate(wanted)]
    for name, texts in (("number_raw", answers.measure("number_raw", prompts)),
                        ("number_chat", answers.measure("number_chat", [chatml(p) for p in prompts]))):  # fmt: skip
        hits = sum(text.lower().count(word) == 1 for text, word in zip(texts, wanted, strict=True))
        answers.figures[name]["word_once"] = round(100 * hits / len(wanted), 2)
    greedy = [answers.ask(form, 0, temperature=0.0)[0] for form in (main, chatml(main))]
    return {"figures": answers.figures, "greedy": greedy, "samples": samples, "failures": answers.failures[:20]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--seeds", type=int, default=100)
    parser.add_argument("--per-theme", type=int, default=10)
    args = parser.parse_args()
    model = Llama(args.model, n_ctx=1024, verbose=False, n_threads=2)
    print(json.dumps(report(Answers(model), args.seeds, args.per_theme), indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
