"""Ids equal to those of other implementations, for published vocabularies and for two small ones."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import regex
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, Regex, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as HfTokenizer
from transformers import Qwen2Tokenizer
from transformers.convert_slow_tokenizer import generate_merges

from tests.tokenizer.vocabularies import CONTROL, DATA, NORMAL, PUBLISHED, bpe_metadata, golden, unpack, written
from worker_orcd.gguf.reader import GgufFile
from worker_orcd.tokenizer.base import VocabularyTokenizer
from worker_orcd.tokenizer.load import load_tokenizer
from worker_orcd.tokenizer.pretokenize import pre_tokenizer

END_IDS = {
    "qwen2": {151643, 151645},
    "phi-3": {2, 32000, 32007},
    "gpt-2": {50256},
    "llama-bpe": {128001, 128009},
    "llama-spm": {2},
    "gpt-oss": {199999, 200002, 200012},
}


SIZES = {  # padding included
    "qwen2": 151936, "phi-3": 32064, "gpt-2": 50257, "llama-bpe": 128256, "llama-spm": 32000, "gpt-oss": 201088,
}  # fmt: skip
MORE = [  # beside the golden texts: special tokens, letters with separate marks, white space around them
    "<|im_start|>user\nhi<|im_end|>\n", "<|user|>\nhi<|end|>\n<|assistant|>  ok", "<s>a b</s>", " <|end|>   x ",
    "e\u0301 cafe\u0301 \u1112\u1161\u11ab \u212b", "\u0958 ﬁ", "a▁b", "  a  b\n\n\nc", "It'S 12345 wasn't", "🦙🇩🇪",
]  # fmt: skip
O200K = (  # OpenAI's published expression
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|"
    r"\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@pytest.fixture(scope="module", params=PUBLISHED)
def published(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    return request.param, unpack(request.param, tmp_path_factory.mktemp("vocabulary"))


def _load(path: Path) -> VocabularyTokenizer:
    with GgufFile.open(path) as gguf:
        return load_tokenizer(gguf)


def test_published_vocabularies(published: tuple[str, Path]) -> None:
    """Every golden line, by the way for short texts and by the library; the bytes come back; building is quick."""
    name, path = published
    start = time.perf_counter()
    tokenizer = _load(path)
    assert time.perf_counter() - start < 5
    assert tokenizer.eog_ids == END_IDS[name]
    assert (tokenizer.kind, tokenizer.vocab_size) == ("gguf-bpe", SIZES[name])
    assert len(golden(name)) >= 30
    for is_prepared in (False, True):
        if is_prepared:
            tokenizer.prepare()
        for text, ids in golden(name):
            assert tokenizer.encode(text, add_special=False, parse_special=False) == ids, (name, text)
            prefix = " " if text and tokenizer.model == "spm" else ""
            assert tokenizer.decode(ids) == prefix + text


def _qwen2_json(own: VocabularyTokenizer, gguf: GgufFile) -> HfTokenizer:
    """As `transformers` builds it."""
    lines = gguf.require("tokenizer.ggml.merges", "strings").decode_all()
    words = {text: i for text, i in own.vocabulary.ids.items() if own.vocabulary.types[i] == 1}
    library = Qwen2Tokenizer(vocab=words, merges=[tuple(line.split(" ")) for line in lines])._tokenizer
    special = sorted(own.vocabulary.control)
    library.add_special_tokens(
        [AddedToken(own.vocabulary.tokens[i], special=True, normalized=False) for i in special]
    )
    assert isinstance(library, HfTokenizer)
    return library


def _phi3_json(own: VocabularyTokenizer, gguf: GgufFile) -> HfTokenizer:
    """Merges as `transformers` makes them of scores, and the pipeline of the published file."""
    scores, types = gguf.require("tokenizer.ggml.scores", "floats").tolist(), own.vocabulary.types
    pieces = {text: i for text, i in own.vocabulary.ids.items() if i < 32000}
    merges = generate_merges(pieces, {text: scores[i] for text, i in pieces.items() if types[i] == 1})
    library = HfTokenizer(models.BPE(pieces, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    library.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    special = sorted(own.vocabulary.control | {2})
    strips = {i: own.vocabulary.tokens[i] not in ("<unk>", "<s>", "<|endoftext|>") for i in special}
    library.add_special_tokens(
        [AddedToken(own.vocabulary.tokens[i], special=True, normalized=False, rstrip=strips[i]) for i in special]
    )
    return library


@pytest.mark.parametrize(("name", "make"), [("qwen2", _qwen2_json), ("phi-3", _phi3_json)])
def test_tokenizer_json_and_model_file_agree(
    name: str, make: Callable[[VocabularyTokenizer, GgufFile], HfTokenizer], tmp_path: Path
) -> None:
    with GgufFile.open(unpack(name, tmp_path)) as gguf:
        own = load_tokenizer(gguf)
        make(own, gguf).save(str(tmp_path / "tokenizer.json"))
        other = load_tokenizer(gguf)
    assert (other.kind, other.vocab_size, other.eog_ids) == ("hf-json", SIZES[name], END_IDS[name])
    for text in [*MORE, *(text for text, _ in golden(name))]:
        for parse_special in (True, False):
            assert own.encode(text, True, parse_special) == other.encode(text, True, parse_special), text


def test_the_ends_of_gpt_oss(tmp_path: Path) -> None:
    """The special tokens of harmony at their published ids; <|end|> ends a message, whatever a file says of it."""
    marks = {199998: "<|startoftext|>", 199999: "<|endoftext|>", 200002: "<|return|>", 200003: "<|constrain|>"}
    marks |= {
        200005: "<|channel|>",
        200006: "<|start|>",
        200007: "<|end|>",
        200008: "<|message|>",
        200012: "<|call|>",
    }
    tokens = [marks.get(i, f"t{i}") for i in range(200_020)]
    metadata = bpe_metadata({}, "gpt-4o", bos_token_id=199998, eos_token_id=200002, eot_token_id=200007) | {
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if i in marks else NORMAL for i in range(len(tokens))],
        "tokenizer.ggml.merges": ["t 0"],
    }
    tokenizer = load_tokenizer(written(tmp_path, metadata))
    assert tokenizer.eog_ids == {199999, 200002, 200012}
    prompt = "<|start|>assistant<|channel|>final<|message|>"
    assert [i for i in tokenizer.encode(prompt) if i in marks] == [200006, 200005, 200008]


HARMONY = [  # with the ids of OpenAI's tiktoken, o200k_harmony, all special tokens allowed
    (
        "<|start|>system<|message|>Reasoning: low<|end|><|start|>user<|message|>Schöne Grüße,  你好!<|end|>",
        [200006, 17360, 200008, 30377, 289, 25, 4465, 200007, 200006, 1428, 200008, 14948, 61362, 99720, 11, 220, 220,
         177519, 0, 200007],
    ),
    (
        "<|channel|>analysis<|message|>We're  asked…\n\n<|end|><|start|>bot<|channel|>final<|message|>4 <|return|>",
        [200005, 35644, 200008, 48503, 220, 7747, 4369, 200007, 200006, 13669, 200005, 17196, 200008, 19, 220,
         200002],
    ),
    (
        "<|call|><|constrain|>json<|reserved_200013|><|reserved_201087|><|endoftext|> <|start",
        [200012, 200003, 4108, 200013, 201087, 199999, 464, 91, 5236],
    ),
]  # fmt: skip


def test_conversations_of_gpt_oss(tmp_path: Path) -> None:
    """Special tokens are read where they are asked for, and only there."""
    tokenizer = _load(unpack("gpt-oss", tmp_path))
    for text, ids in HARMONY:
        assert tokenizer.encode(text, add_special=False, parse_special=True) == ids
        assert not tokenizer.vocabulary.control & set(tokenizer.encode(text, add_special=False, parse_special=False))


@given(st.text(st.sampled_from("aBéßǅ中ा\u0301'sTllREve'd019½ \n\r\t /.,_-!🦙\u00a0\u2028"), max_size=40))
def test_words_of_gpt_oss(text: str) -> None:
    """Cut as OpenAI's expression does it, run by another engine of regular expressions."""
    words = [text[begin:end] for _, (begin, end) in _O200K_WORDS.pre_tokenize_str(text)]
    assert words == regex.findall(O200K, text)


_O200K_WORDS = pre_tokenizers.Sequence(
    [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre_tokenizer("gpt-4o").patterns]
)


@pytest.mark.parametrize("name", ["small-bpe", "small-spm"])
@pytest.mark.parametrize("is_prepared", [False, True])
def test_small_vocabularies(name: str, is_prepared: bool) -> None:
    tokenizer = _load(DATA / f"{name}.gguf")
    if is_prepared:
        tokenizer.prepare()
    rows = json.loads((DATA / f"{name}.json").read_text(encoding="utf-8"))
    assert len(rows) >= 40
    for row in rows:
        assert tokenizer.encode(row["text"], add_special=False, parse_special=False) == row["ids"], row
        assert tokenizer.encode(row["text"], add_special=False, parse_special=True) == row["special"], row


_SHORT = _load(DATA / "small-bpe.gguf")
_LONG = _load(DATA / "small-bpe.gguf")
_LONG.prepare()
_SPM = _load(DATA / "small-spm.gguf")


@given(st.text(max_size=200))
def test_both_ways_of_merging_agree(text: str) -> None:
    assert _SHORT.encode(text) == _LONG.encode(text)


@given(st.text(st.sampled_from("the river carries moon\n12é水古🐸<>|endsp▁"), max_size=200))
def test_text_survives(text: str) -> None:
    assert _LONG.decode(_LONG.encode(text, parse_special=False)) == text
    ids = _SPM.encode(text, add_special=False, parse_special=False)
    assert _SPM.decode(ids) == (" " + text.replace("▁", " ") if text else "")


@given(st.text(st.sampled_from("therivcamon \n"), max_size=60))
def test_spm_merges_by_score_left_most_first(text: str) -> None:
    """The definition, written out: merge the neighbours whose piece has the best score until none is left."""
    scores = _SPM_SCORES
    parts = list("▁" + text.replace(" ", "▁")) if text else []
    while True:
        made = [scores.get(left + right, -1e30) for left, right in pairwise(parts)]
        if not made or max(made) == -1e30:
            break
        at = made.index(max(made))
        parts[at : at + 2] = [parts[at] + parts[at + 1]]
    spelled = [[part] if part in scores else [f"<0x{byte:02X}>" for byte in part.encode()] for part in parts]
    expected = [_SPM.vocabulary.ids[token] for tokens in spelled for token in tokens]
    assert _SPM.encode(text, add_special=False, parse_special=False) == expected


def _scores() -> dict[str, float]:
    with GgufFile.open(DATA / "small-spm.gguf") as gguf:
        scores = gguf.require("tokenizer.ggml.scores", "floats").tolist()
        types = gguf.require("tokenizer.ggml.token_type", "ints").tolist()
        tokens = gguf.require("tokenizer.ggml.tokens", "strings").decode_all()
    return {text: score for text, score, kind in zip(tokens, scores, types, strict=True) if kind == 1}


_SPM_SCORES = _scores()
