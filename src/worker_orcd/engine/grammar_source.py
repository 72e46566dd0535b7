"""From a Grammar to llguidance's matcher, within limits; run as a program it only says whether that succeeds.

The program is meant to be expendable: it reads a Grammar as JSON from standard input, lowers its own limits, and
writes what is wrong with the grammar, or nothing. Whoever started it may kill it, and so may the kernel.
"""

from __future__ import annotations

import re
import resource
import sys

import msgspec
from llguidance import LLMatcher, LLParserLimits, LLTokenizer

from worker_orcd.engine.request import Grammar
from worker_orcd.errors import GrammarError

CHILD_BYTES = 2**30  # of address space
CHILD_CPU_S = 5
REFUSED_EXIT = 4
SPACE = r"( |\n[ \t]{0,40})"  # between JSON's tokens, as any writer of JSON does; some models would never stop
MAX_MESSAGE = 500  # characters
SPECIAL = b"\xff"  # before the name of a token that is not text: a byte that no text has
SPECIAL_NAME = re.compile(r"<[^<>\s]{1,64}>")  # in Lark
NON_VERBOSE = "\n<non-verbose/>"  # llguidance's remark that it leaves out the grammar's text


def new_matcher(tokenizer: LLTokenizer, grammar: Grammar) -> LLMatcher:
    """A matcher that has done the costly part of its work; raises GrammarError with the library's own words."""
    try:
        source = _source(grammar)
    except ValueError as error:
        raise GrammarError(f"response_format: {str(error)[:MAX_MESSAGE]}") from None
    matcher = LLMatcher(tokenizer, source, log_level=0, limits=_limits(grammar))
    matcher.compute_bitmask()  # the first mask takes longest
    check(matcher)
    return matcher


def check(matcher: LLMatcher) -> None:
    """Raise GrammarError when the matcher has given up."""
    if matcher.is_error():
        message = matcher.get_error().replace(NON_VERBOSE, "").strip()
        message = "nothing can satisfy it" if message == "NoExtensionBias" else message
        raise GrammarError(f"response_format: {message[:MAX_MESSAGE]}")


def _source(grammar: Grammar) -> str:
    match grammar.kind:
        case "json_object":
            return LLMatcher.grammar_from_json_schema({"type": "object"}, {"whitespace_pattern": SPACE})
        case "json_schema":
            return LLMatcher.grammar_from_json_schema(grammar.text, {"whitespace_pattern": SPACE})
        case "regex":
            return LLMatcher.grammar_from_regex(grammar.text)
        case "lark":
            return LLMatcher.grammar_from_lark(grammar.text)


def _limits(grammar: Grammar) -> LLParserLimits:
    """Below the library's own, where a step of everyone would wait for one mask, or memory would grow with it.

    A schema has four items in a row for each optional property; an ambiguous grammar takes time quadratic in them.
    """
    return LLParserLimits(
        max_items_in_row=1000 if grammar.kind.startswith("json") else 500,
        step_lexer_fuel=100_000,  # 7 ms
        step_max_items=50_000,  # 2.5 ms
        max_lexer_states=50_000,  # 100 MB
        max_grammar_size=200_000,
        verbose_errors=False,
    )


class Bytes:
    """A vocabulary for grammars of any model: single bytes, and every special token that `text` may name."""

    is_tokenizer_wrapper = True
    bos_token_id = None
    special_token_ids = ()
    eos_token_id = 256

    def __init__(self, text: str) -> None:
        names = sorted(set(SPECIAL_NAME.findall(text)))
        self.tokens = [*(bytes([i]) for i in range(256)), b"", *(SPECIAL + name.encode() for name in names)]

    def __call__(self, text: str) -> list[int]:
        return list(text.encode())


def main() -> int:
    resource.setrlimit(resource.RLIMIT_CPU, (CHILD_CPU_S, CHILD_CPU_S))
    resource.setrlimit(resource.RLIMIT_AS, (CHILD_BYTES, CHILD_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    grammar = msgspec.json.decode(sys.stdin.buffer.read(), type=Grammar)
    try:
        new_matcher(LLTokenizer(Bytes(grammar.text)), grammar)  # type: ignore[arg-type]
    except GrammarError as error:
        sys.stdout.write(error.message)
        return REFUSED_EXIT
    return 0


if __name__ == "__main__":
    sys.exit(main())
