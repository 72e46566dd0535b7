"""Messages in harmony as OpenAI's own library reads them, token by token."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from itertools import groupby

import openai_harmony
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.tokenizer.vocabularies import unpack
from worker_orcd.gguf.reader import GgufFile
from worker_orcd.server.output.harmony import HarmonyParser
from worker_orcd.server.output.pieces import Content, Reasoning, ToolCall
from worker_orcd.tokenizer.base import VocabularyTokenizer
from worker_orcd.tokenizer.load import load_tokenizer

O200K_SHA256 = "446a9538cb6c348e3516120d7c08b09f57c36495e2acfffe59a5bf8b0cfb1a2d"
Read = list[tuple[str, str]]  # kind or name of a function, text; neighbours of one kind are joined


@pytest.fixture(scope="module")
def gpt_oss(tmp_path_factory: pytest.TempPathFactory) -> VocabularyTokenizer:
    with GgufFile.open(unpack("gpt-oss", tmp_path_factory.mktemp("vocabulary"))) as gguf:
        return load_tokenizer(gguf)


@pytest.fixture(scope="module")
def oracle(
    gpt_oss: VocabularyTokenizer, tmp_path_factory: pytest.TempPathFactory
) -> Iterator[openai_harmony.HarmonyEncoding]:
    """The library with the file of ranks that our vocabulary was made of, which it would otherwise download."""
    count = min(gpt_oss.vocabulary.control)
    lines = (base64.b64encode(gpt_oss.token_bytes(i)) + b" %d\n" % i for i in range(count))
    content = b"".join(lines)
    assert hashlib.sha256(content).hexdigest() == O200K_SHA256, "what OpenAI publishes"
    folder = tmp_path_factory.mktemp("encodings")
    (folder / "o200k_base.tiktoken").write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("TIKTOKEN_ENCODINGS_BASE", str(folder))
        yield openai_harmony.load_harmony_encoding(openai_harmony.HarmonyEncodingName.HARMONY_GPT_OSS)


def theirs(oracle: openai_harmony.HarmonyEncoding, ids: list[int]) -> Read:
    parser = openai_harmony.StreamableParser(oracle, role=openai_harmony.Role.ASSISTANT)
    for token in ids:
        parser.process(token)
    found = []
    for message in parser.messages:
        name = (message.recipient or "").removeprefix("functions.")
        kind = name or ("reasoning" if message.channel == "analysis" else "content")
        found.append((kind, "".join(part.text for part in message.content)))
    return _joined(found)


def ours(tokenizer: VocabularyTokenizer, ids: list[int]) -> Read:
    parser, text = HarmonyParser(True, lambda: "id", ""), tokenizer.decode(ids, skip_special=False)
    pieces = [piece for letter in text for piece in parser.feed(letter)]
    found: Read = []
    for piece in [*pieces, *parser.finish()]:
        match piece:
            case ToolCall(_, _, name, text):
                found.append((name or found[-1][0], text))
            case Content(text):
                found.append(("content", text))
            case Reasoning(text):
                found.append(("reasoning", text))
    return _joined(found)


def _joined(found: Read) -> Read:
    return [(kind, "".join(text for _, text in group)) for kind, group in groupby(found, key=lambda part: part[0])]


HEADERS = (
    "<|channel|>analysis", "<|channel|>final", "<|channel|>commentary",
    "<|channel|>commentary to=functions.now <|constrain|>json", " to=functions.look<|channel|>commentary json",
)  # fmt: skip
MESSAGE = st.tuples(st.sampled_from(HEADERS), st.text(st.sampled_from("ab {}\"':,\n1<|é"), min_size=1, max_size=12))


@settings(max_examples=150)
@given(st.lists(MESSAGE, min_size=1, max_size=5))
def test_messages_are_read_as_openai_reads_them(
    oracle: openai_harmony.HarmonyEncoding, gpt_oss: VocabularyTokenizer, messages: list[tuple[str, str]]
) -> None:
    said = "<|end|><|start|>assistant".join(f"{header}<|message|>{text}" for header, text in messages) + "<|end|>"
    ids = gpt_oss.encode(said, add_special=False)
    assert ids == oracle.encode(said, allowed_special="all")
    assert ours(gpt_oss, ids) == theirs(oracle, ids)
