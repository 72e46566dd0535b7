"""Grammars from their text to the last token of an answer; and the child process that looks at them first."""

from __future__ import annotations

import asyncio
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests import tiny
from tests.engine.scripted import Rig, ScriptedStep
from tests.engine.scripted import request as scripted_request
from tests.fakes import EOS, ByteTokenizer
from tests.running import runtime_of
from worker_orcd.engine import core as core_module
from worker_orcd.engine import grammar_source
from worker_orcd.engine.core import EngineCore
from worker_orcd.engine.grammar import GrammarCompiler, Matcher, fill_masks
from worker_orcd.engine.plain_step import PlainStep
from worker_orcd.engine.request import Event, Failed, Finished, Grammar, Request, SamplingParams, Tokens
from worker_orcd.engine.runtime import Runtime
from worker_orcd.engine.sampler import Sampler
from worker_orcd.engine.scheduler import SchedulerLimits
from worker_orcd.errors import InvalidRequest
from worker_orcd.server import grammar_check
from worker_orcd.server.grammar_check import GrammarChecker

VOCAB = 300  # of the model: 256 bytes, the end, and rows without a token
SCHEMA = {
    "type": "object",
    "properties": {"n": {"type": "integer"}, "tags": {"type": "array", "items": {"enum": ["x", "y"]}, "maxItems": 3}},
    "required": ["n", "tags"],
    "additionalProperties": False,
}
JSON = Grammar("json_schema", json.dumps(SCHEMA))
DATE = Grammar("regex", "[0-9]{4}-[0-9]{2}")
TEXTS = st.text(st.characters(codec="utf-8", exclude_characters="\x7f"), max_size=5)  # DEL is never left unescaped


class SpacedTokenizer(ByteTokenizer):
    """Like SentencePiece it puts a space before every text; id 257 is a mark that is no text."""

    vocab_size = 258

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:  # noqa: ARG002
        return list(b" " + text.encode())

    def is_control(self, token_id: int) -> bool:
        return token_id >= EOS

    def decode(self, ids: Any, skip_special: bool = True) -> str:  # noqa: ARG002
        return "<|call|>" if list(ids) == [257] else "<eos>"


@pytest.fixture(scope="module")
def compiler() -> GrammarCompiler:
    return GrammarCompiler(SpacedTokenizer, VOCAB)


def allowed(matcher: Matcher, banned: Any = ()) -> set[int]:
    both = fill_masks([None, matcher], [(), banned])
    assert (both[0] == -1).all(), "a row without a grammar"
    return set(np.flatnonzero(np.unpackbits(both[1].view(np.uint8), bitorder="little")).tolist())


def test_a_mask_is_what_the_language_allows_next(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(Grammar("regex", "ab+c?")).result()
    assert allowed(matcher) == {ord("a")}
    assert not matcher.advance(ord("a"))
    assert allowed(matcher) == {ord("b")}
    assert not matcher.advance(ord("b"))
    assert allowed(matcher) == {ord("b"), ord("c"), EOS}
    assert allowed(matcher, {EOS}) == {ord("b"), ord("c")}
    assert matcher.advance(ord("c")), "nothing may follow"


def test_an_end_that_is_banned_comes_when_nothing_else_may(compiler: GrammarCompiler) -> None:
    matcher = compiler.compile(Grammar("lark", 'start: "a" <|call|>?')).result()
    matcher.advance(ord("a"))
    assert allowed(matcher, {EOS, 257}) == {EOS, 257}
    assert allowed(matcher, {EOS}) == {257}


def test_control_tokens_come_only_where_a_grammar_names_them(compiler: GrammarCompiler) -> None:
    named = compiler.compile(Grammar("lark", 'start: <|call|> "a"')).result()
    assert allowed(named) == {257}
    anything = compiler.compile(Grammar("regex", "(?s:.)*")).result()
    assert allowed(anything) & set(range(EOS, VOCAB)) == {EOS}


def test_a_model_without_an_end_stops_where_the_grammar_does() -> None:
    class Endless(ByteTokenizer):
        eog_ids: frozenset[int] = frozenset()

    matcher = GrammarCompiler(Endless, VOCAB).compile(DATE).result()
    assert [matcher.advance(byte) for byte in b"2024-12"] == [False] * 6 + [True]


@settings(max_examples=25)
@given(
    document=st.recursive(
        st.none() | st.booleans() | st.integers() | TEXTS,
        lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
        max_leaves=6,
    ),
    indent=st.none() | st.integers(0, 4),
)
def test_every_json_object_is_accepted_and_no_half_of_one(
    compiler: GrammarCompiler, document: Any, indent: int | None
) -> None:
    text = json.dumps({"k": document}, indent=indent, ensure_ascii=False).encode()
    matcher = compiler.compile(Grammar("json_object")).result()
    for byte in text[:-1]:
        assert EOS not in allowed(matcher)
        assert not matcher.advance(byte)
    assert matcher.advance(text[-1])


@pytest.mark.parametrize(
    ("grammar", "message"),
    [
        (Grammar("json_schema", "{"), "EOF|expected"),
        (Grammar("json_schema", '{"type": "foo"}'), "Invalid type: foo"),
        (Grammar("json_schema", '{"$ref": "http://127.0.0.1/x"}'), "does not fetch"),
        (Grammar("json_schema", '{"$ref": "#/a", "a": {"anyOf": [{"$ref": "#/a"}]}}'), "stack level exceeded"),
        (Grammar("lark", "start: a\na: a a"), "nothing can satisfy it"),
        (Grammar("regex", "("), "unclosed group"),
        (Grammar("lark", "start: foo"), "unknown name"),
        (Grammar("lark", "start: " + "(" * 20_000 + '"a"' + ")" * 20_000), "too deeply nested"),
    ],
)
def test_what_cannot_be_compiled_is_refused_with_the_reason(
    compiler: GrammarCompiler, grammar: Grammar, message: str
) -> None:
    with pytest.raises(InvalidRequest, match=f"(?s)^response_format: .*({message})"):
        compiler.compile(grammar).result()


# ---------------------------------------------------------------------- through the engine


@pytest.fixture(scope="module")
def runtime(tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "intermediate_size": 48}
    path = tiny.build("qwen2", **sizes).write(tmp_path_factory.mktemp("model") / "tiny.gguf")
    return runtime_of(path, kv_block_size=4, context_length=256, max_batch=8)


def run(
    runtime: Runtime, compiler: GrammarCompiler, requests: list[Request], overlaps: bool = False
) -> list[tuple[list[int], str]]:
    """Tokens and end of each."""
    step = PlainStep(runtime, Sampler(list(range(257, VOCAB)), runtime.device, frozenset({EOS})))
    step.overlaps = overlaps
    core = EngineCore(step, SchedulerLimits(8, 64, 256), frozenset({EOS}), {}, compiler=compiler)
    events: list[list[Event]] = [[] for _ in requests]
    for i, request in enumerate(requests):
        core.submit(i, request)
    while core.has_work:
        for number, event in core.tick().events:
            events[number].append(event)
    assert core.check() == ""
    core.drop_cache()
    ids = [[token for event in told if isinstance(event, Tokens) for token in event.ids] for told in events]
    ends = [told[-1].reason if isinstance(told[-1], Finished) else getattr(told[-1], "code", "") for told in events]
    return list(zip(ids, ends, strict=True))


def ask(name: str, grammar: Grammar | None, max_tokens: int = 80, **fields: Any) -> Request:
    """From the noise of a random model, at a temperature at which it says everything."""
    params = SamplingParams(len(name) * 31, temperature=1.5)
    return Request(name, list(name.encode()), max_tokens, params, grammar=grammar, **fields)


@pytest.mark.parametrize("overlaps", [False, True])
def test_answers_are_of_the_language_and_the_same_in_any_company(
    runtime: Runtime, compiler: GrammarCompiler, overlaps: bool
) -> None:
    requests = [ask("d" * n, DATE) for n in range(1, 4)] + [ask("j" * n, JSON) for n in range(5, 9)]
    requests += [ask("plain", None, 20), ask("short", JSON, 3)]
    together = run(runtime, compiler, requests, overlaps)
    for request, (ids, end) in zip(requests, together, strict=True):
        assert run(runtime, compiler, [request]) == [(ids, end)], "alone"
        if request.grammar is None or request.max_tokens < 20:
            assert end == "max_tokens"
            continue
        assert end in ("eos", "max_tokens")
        text = bytes(ids).decode()
        if request.grammar is DATE:
            assert re.fullmatch(request.grammar.text, text)
        elif end == "eos":
            document = json.loads(text)
            assert isinstance(document["n"], int)
            assert set(document["tags"]) <= {"x", "y"}
    assert sum(end == "eos" for _, end in together) >= 6


def test_min_tokens_and_ignore_eos_cannot_break_the_grammar(runtime: Runtime, compiler: GrammarCompiler) -> None:
    digits = Grammar("regex", "[0-9]{2,}")
    (few, many) = run(runtime, compiler, [ask("a", DATE, min_tokens=50, ignore_eos=True), ask("b", digits, 30)])
    assert few[1] == "eos"
    assert len(few[0]) == 7
    ((forced, _),) = run(runtime, compiler, [ask("b", digits, 60, min_tokens=60)])
    assert len(forced) == 60
    assert re.fullmatch("[0-9]{60}", bytes(forced).decode())
    assert forced[: len(many[0])] == many[0]


def test_a_grammar_that_becomes_too_complex_ends_its_own_request(runtime: Runtime, compiler: GrammarCompiler) -> None:
    ambiguous = Grammar("lark", 'start: e\ne: e e | "a" | "b" | e "c" e')
    others = [ask("d", DATE), ask("plain", None, 200)]
    alone = run(runtime, compiler, others)
    (_, end), *rest = run(runtime, compiler, [ask("x", ambiguous, 240, ignore_eos=True), *others])
    assert end == "GRAMMAR_ERROR"
    assert rest == alone


class Idle:
    """A compiler that never gets anywhere, or fails."""

    def __init__(self) -> None:
        self.futures: list[Future[Matcher]] = []

    def compile(self, grammar: Grammar) -> Future[Matcher]:  # noqa: ARG002
        self.futures.append(Future())
        return self.futures[-1]


def idle_rig() -> tuple[Rig, Idle]:
    rig, idle = Rig(ScriptedStep()), Idle()
    rig.core._compiler = idle  # type: ignore[assignment]
    return rig, idle


def test_while_one_compiles_the_others_run() -> None:
    rig, idle = idle_rig()
    rig.submit(scripted_request("slow", grammar=DATE), scripted_request("bad", grammar=DATE), scripted_request("b"))
    idle.futures[1].set_exception(InvalidRequest("response_format: no"))
    for _ in range(8):
        stats = rig.tick().stats
    assert rig.end("b") == "max_tokens"
    assert rig.events["bad"] == [
        Failed("INVALID_REQUEST", "response_format: no", False, rig.events["bad"][0].timings)
    ]
    assert rig.events["slow"] == []
    assert stats is not None
    assert stats.num_waiting == 1
    rig.clock.now_s += core_module.COMPILE_S + 1
    rig.run()
    assert rig.end("slow") == "GRAMMAR_ERROR"


def test_a_grammar_has_its_time_from_when_it_begins_to_be_compiled() -> None:
    """The request may have come while the engine was in a long step."""
    rig, _ = idle_rig()
    rig.core.submit(1, scripted_request("beside", max_tokens=2))
    rig.core.submit(2, scripted_request("late", grammar=DATE), rig.clock.now_s - core_module.COMPILE_S - 1)
    assert {number for _ in range(3) for number, _ in rig.core.tick().events} == {1}
    rig.clock.now_s += core_module.COMPILE_S + 1
    [(number, failed)] = rig.core.tick().events
    assert (number, failed.code) == (2, "GRAMMAR_ERROR")


def test_a_request_can_be_cancelled_while_it_compiles() -> None:
    rig, idle = idle_rig()
    rig.submit(scripted_request("a", grammar=DATE))
    rig.tick()
    rig.cancel("a")
    rig.run()
    assert rig.end("a") == "CANCELLED"
    assert idle.futures[0].cancelled()


def test_an_engine_without_a_compiler_says_so() -> None:
    rig = Rig()
    rig.submit(scripted_request("a", grammar=DATE))
    rig.run()
    assert rig.end("a") == "INVALID_REQUEST"


# ---------------------------------------------------------------------- the child that goes first


def new_check() -> Callable[[Grammar], None]:
    """A checker, asked on a loop of its own each time."""
    checker = GrammarChecker()
    return lambda grammar: asyncio.run(checker.check(grammar))


def test_the_checker_passes_what_is_good_and_names_what_is_not(monkeypatch: pytest.MonkeyPatch) -> None:
    check = new_check()
    check(Grammar("lark", 'start: <|channel|> "x" %json {"type": "object"}'))
    check(JSON)
    with pytest.raises(InvalidRequest, match="unclosed group") as caught:
        check(Grammar("regex", "("))
    assert [field.field for field in caught.value.fields] == ["response_format"]
    with pytest.raises(InvalidRequest, match="65536 bytes"):
        check(Grammar("regex", "é" * 40_000))
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("a child for a grammar that is known"))
    check(JSON)
    check(Grammar("json_object"))


HUNGRY = "import resource; resource.setrlimit(resource.RLIMIT_AS, (2**28, 2**28)); bytes(2**29)"


@pytest.mark.parametrize("code", ["import time; time.sleep(60)", HUNGRY, "import os; os.abort()"])
def test_a_child_that_hangs_or_dies_is_a_grammar_refused(code: str, monkeypatch: pytest.MonkeyPatch) -> None:
    real = subprocess.run
    monkeypatch.setattr(grammar_check, "COMPILE_S", 0.5)
    monkeypatch.setattr(subprocess, "run", lambda _, **rest: real([sys.executable, "-c", code], **rest))
    check, began = new_check(), time.monotonic()
    with pytest.raises(InvalidRequest, match="simplify it"):
        check(DATE)
    assert time.monotonic() - began < 20
    monkeypatch.undo()
    check(DATE)


def test_the_child_limits_itself() -> None:
    code = (
        "import io, resource, sys; from worker_orcd.engine import grammar_source as g\n"
        'sys.stdin = io.TextIOWrapper(io.BytesIO(b\'{"kind": "json_object"}\'))\n'
        "assert g.main() == 0\n"
        "print(resource.getrlimit(resource.RLIMIT_AS)[0], resource.getrlimit(resource.RLIMIT_CPU)[0])\n"
        "bytes(2**31)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == [str(grammar_source.CHILD_BYTES), str(grammar_source.CHILD_CPU_S)]
    assert "MemoryError" in done.stderr


def test_the_two_sides_agree_on_how_a_child_ends() -> None:
    assert grammar_check.REFUSED_EXIT == grammar_source.REFUSED_EXIT
    assert grammar_source.__name__ == grammar_check.COMPILER_MODULE
