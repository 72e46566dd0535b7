"""Special tokens, ids with a meaning, errors, long inputs, tokenizer.json."""

from __future__ import annotations

import json
import os
import threading
import time
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from tokenizers import AddedToken, Regex
from tokenizers import Tokenizer as HfTokenizer
from tokenizers.pre_tokenizers import Split

from tests.fakes import ByteTokenizer
from tests.tokenizer.vocabularies import (
    CONTROL,
    DATA,
    NORMAL,
    UNUSED,
    USER_DEFINED,
    bpe_metadata,
    spm_metadata,
    written,
)
from worker_orcd.errors import InvalidRequest, ModelLoadFailed
from worker_orcd.gguf.reader import GgufFile
from worker_orcd.gguf.writer import write_gguf
from worker_orcd.tokenizer.base import encode_within
from worker_orcd.tokenizer.bpe import BpeTokenizer
from worker_orcd.tokenizer.hf_json import MAX_JSON_BYTES
from worker_orcd.tokenizer.load import load_tokenizer
from worker_orcd.tokenizer.pretokenize import PRE_TOKENIZERS, pre_tokenizer
from worker_orcd.tokenizer.vocabulary import Vocabulary

PIECES = {"▁": -9, "a": -8, "b": -7, "▁a": -1, "ab": -2, "▁ab": -3, "▁▁": -4, "▁▁▁": -4}


def _bpe(folder: Path, extra: dict[str, int], **others: Any) -> BpeTokenizer:
    tokenizer = load_tokenizer(written(folder, bpe_metadata(extra, **others)))
    assert isinstance(tokenizer, BpeTokenizer)
    return tokenizer


def _texts(tokenizer: Any, ids: list[int]) -> list[str]:
    return [tokenizer.vocabulary.tokens[i] for i in ids]


def test_special_tokens_are_parsed_on_demand(tmp_path: Path) -> None:
    tokenizer = _bpe(tmp_path, {"<|x|>": CONTROL, "<|x|>y": CONTROL, "<u>": USER_DEFINED, "[PAD101]": USER_DEFINED})
    parse, plain = tokenizer.encode("he<|x|>y<u>"), tokenizer.encode("he<|x|>y<u>", parse_special=False)
    assert _texts(tokenizer, parse) == ["he", "<|x|>y", "<u>"]
    assert _texts(tokenizer, plain) == ["he", "<", "|", "x", "|", ">", "y", "<u>"]
    assert tokenizer.decode(parse) == "he<u>"
    assert tokenizer.decode(parse, skip_special=False) == "he<|x|>y<u>"
    assert tokenizer.token_bytes(parse[1]) == b""
    assert [tokenizer.is_control(i) for i in parse] == [False, True, False]
    assert len(tokenizer.encode("[PAD101]")) == 8, "padding rows are nobody's text"


def test_a_special_token_of_one_character_is_found_beside_longer_ones(tmp_path: Path) -> None:
    tokenizer = _bpe(tmp_path, {"§": CONTROL, "§long": CONTROL})
    assert _texts(tokenizer, tokenizer.encode("§lo§long")) == ["§", "l", "o", "§long"]


@pytest.mark.parametrize(
    ("pre", "keys", "expected"),
    [
        ("qwen2", {}, ["he"]),
        ("llama-bpe", {}, ["<s>", "he"]),
        ("llama-bpe", {"add_bos_token": False}, ["he"]),
        ("qwen2", {"add_bos_token": True, "add_eos_token": True}, ["<s>", "he", "<e>"]),
    ],
)
def test_bos_and_eos_are_added_as_the_file_or_the_pre_tokenizer_says(
    tmp_path: Path, pre: str, keys: dict[str, bool], expected: list[str]
) -> None:
    extra = {"<s>": CONTROL, "<e>": CONTROL}
    tokenizer = _bpe(tmp_path, extra, pre=pre, bos_token_id=98, eos_token_id=99, **keys)
    assert _texts(tokenizer, tokenizer.encode("he")) == expected
    assert _texts(tokenizer, tokenizer.encode("<s>he<e>")) == ["<s>", "he", "<e>"], "never twice"
    assert _texts(tokenizer, tokenizer.encode("he", add_special=False)) == ["he"]
    assert tokenizer.encode("<s>he", parse_special=False).count(98) == expected.count("<s>")


def test_ids_that_end_generation(tmp_path: Path) -> None:
    def ends(extra: dict[str, int], **keys: int) -> list[str]:
        tokenizer = _bpe(tmp_path, extra, **keys)
        return sorted(_texts(tokenizer, list(tokenizer.eog_ids)))

    harmony = {"<|return|>": CONTROL, "<|call|>": CONTROL, "<|end|>": CONTROL, "<|endoftext|>": CONTROL}
    assert ends(harmony) == ["<|call|>", "<|endoftext|>", "<|return|>"]
    assert ends({"<|end|>": NORMAL, "<|user|>": CONTROL}) == ["<|end|>"], "marked or not"
    llama3 = {"<|eot_id|>": CONTROL, "<|eom_id|>": CONTROL, "<|end_of_text|>": CONTROL, "<|python_tag|>": CONTROL}
    assert ends(llama3, eos_token_id=98) == ["<|end_of_text|>", "<|eom_id|>", "<|eot_id|>"]
    assert ends({"<eos>": CONTROL, "<end_of_turn>": CONTROL, "<pad>": CONTROL}) == ["<end_of_turn>", "<eos>"]
    assert ends({"</s>": CONTROL, "[INST]": CONTROL, "[TOOL_CALLS]": CONTROL}) == ["</s>"]
    qwen = {"<|im_end|>": CONTROL, "<|endoftext|>": CONTROL, "<tool_call>": USER_DEFINED, "</think>": USER_DEFINED}
    assert ends(qwen) == ["<|endoftext|>", "<|im_end|>"]
    assert ends({"</s>": NORMAL}) == [], "a tag of HTML that the vocabulary has learned"
    assert ends({"</s>": CONTROL, "<|file_sep|>": CONTROL}) == ["</s>", "<|file_sep|>"]
    assert ends({"<over>": CONTROL, "<turn>": CONTROL}, eos_token_id=98, eot_token_id=99) == ["<over>", "<turn>"]


def test_padding_and_unused_tokens_are_never_sampled_nor_text(tmp_path: Path) -> None:
    tokenizer = _bpe(tmp_path, {"<r0>": UNUSED, "[PAD99]": USER_DEFINED, "[PAD7]": USER_DEFINED})
    assert list(tokenizer.unsampleable) == [98, 99]
    assert [tokenizer.token_bytes(i) for i in (98, 99, 100)] == [b"", b"", b"[PAD7]"]


def test_token_ids_out_of_range_are_refused(tmp_path: Path) -> None:
    tokenizer = _bpe(tmp_path, {})
    for token_id in (-1, tokenizer.vocab_size):
        with pytest.raises(InvalidRequest, match=f"token id {token_id} "):
            tokenizer.decode([token_id])


def test_surrogates_become_replacement_characters() -> None:
    with GgufFile.open(DATA / "small-bpe.gguf") as gguf:
        tokenizer = load_tokenizer(gguf)
    assert tokenizer.decode(tokenizer.encode("a\ud800b\ud83d\ude00")) == "a\ufffdb😀"


@pytest.mark.parametrize(
    ("space_prefix", "text", "expected"),
    [
        (True, "ab", ["▁ab"]),
        (True, " ab", ["▁", "▁ab"]),
        (False, "ab", ["ab"]),
        (True, "a<|u|>ab<|u|>  é", ["▁a", "<|u|>", "▁ab", "<|u|>", "▁▁▁", "<0xC3>", "<0xA9>"]),
        (True, "", []),
    ],
)
def test_spm_prefix_and_byte_fallback(tmp_path: Path, space_prefix: bool, text: str, expected: list[str]) -> None:
    metadata = spm_metadata(PIECES, {"<|u|>": CONTROL}, add_space_prefix=space_prefix)
    tokenizer = load_tokenizer(written(tmp_path, metadata))
    assert _texts(tokenizer, tokenizer.encode(text, add_special=False)) == expected
    assert tokenizer.encode(text)[:1] == [1]
    assert (tokenizer.kind, tokenizer.model) == ("gguf-bpe", "spm")


def test_phi3_special_tokens_own_the_white_space_after_them(tmp_path: Path) -> None:
    metadata = spm_metadata(PIECES, {"<|u|>": CONTROL, "<|endoftext|>": CONTROL}) | {"general.architecture": "phi3"}
    tokenizer = load_tokenizer(written(tmp_path, metadata))
    ids = tokenizer.encode("<|u|> \n ab<|endoftext|> a", add_special=False)
    assert _texts(tokenizer, ids) == ["<|u|>", "▁ab", "<|endoftext|>", "▁", "▁a"]


def test_kinds(tmp_path: Path) -> None:
    tokenizer = _bpe(tmp_path, {})
    assert (tokenizer.kind, tokenizer.model) == ("gguf-bpe", "bpe")
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (None, None, 98)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"tokenizer.ggml.model": "rwkv"}, "tokenizer.ggml.model 'rwkv'.*gpt2 and llama"),
        ({"tokenizer.ggml.pre": "brand-new"}, "tokenizer.ggml.pre 'brand-new'.*known are.*llama-bpe"),
        (
            {"tokenizer.ggml.tokens": ["a", "b", "a"], "tokenizer.ggml.token_type": [1, 1, 1]},
            "ids 0 and 2 have the same",
        ),
        ({"tokenizer.ggml.token_type": [9] * 98}, "token_type"),
    ],
)
def test_what_is_wrong_with_a_vocabulary_is_named(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ModelLoadFailed, match=message):
        load_tokenizer(written(tmp_path, bpe_metadata({}) | changes)).prepare()


def test_merges_that_make_no_token_are_passed_over(tmp_path: Path) -> None:
    """Such files exist and llama.cpp runs them; the little loop and the library must agree."""
    metadata = bpe_metadata({}) | {"tokenizer.ggml.merges": ["h zz", "l o", "h e", "he l"]}
    tokenizer = load_tokenizer(written(tmp_path, metadata))
    quick = tokenizer.encode("hello lo")
    tokenizer.prepare()
    assert tokenizer.encode("hello lo") == quick
    assert tokenizer.decode(quick) == "hello lo"
    assert len(quick) == 6  # hel l o, space, l o


def test_malformed_merges_are_passed_over(tmp_path: Path) -> None:
    """By the little loop and the library alike: what is accepted must not depend on the length of a text."""
    merges = ["h", "h e l", "h e", " l", "l ", "", "he  l", "he l"]
    metadata = bpe_metadata({}) | {"tokenizer.ggml.merges": merges}
    tokenizer = load_tokenizer(written(tmp_path, metadata))
    quick = tokenizer.encode("hello l")
    assert _texts(tokenizer, quick) == ["hel", "l", "o", "Ġ", "l"]
    tokenizer.prepare()
    assert tokenizer.encode("hello l") == quick


def test_merges_may_be_malformed_throughout(tmp_path: Path) -> None:
    tokenizer = load_tokenizer(written(tmp_path, bpe_metadata({}) | {"tokenizer.ggml.merges": ["he", "h e l"]}))
    tokenizer.prepare()
    assert _texts(tokenizer, tokenizer.encode("hel")) == ["h", "e", "l"]


def test_spm_byte_tokens_are_known_without_types(tmp_path: Path) -> None:
    metadata = spm_metadata(PIECES, {})
    del metadata["tokenizer.ggml.token_type"]
    tokenizer = load_tokenizer(written(tmp_path, metadata))
    ids = tokenizer.encode("abé", add_special=False)
    assert _texts(tokenizer, ids) == ["▁ab", "<0xC3>", "<0xA9>"]
    assert tokenizer.decode(ids) == " abé"


@pytest.mark.parametrize(("unknown", "expected"), [({}, "<unk>"), ({"unknown_token_id": 2}, "</s>")])
def test_spm_characters_without_a_token_are_the_unknown_one(
    tmp_path: Path, unknown: dict[str, int], expected: str
) -> None:
    metadata = spm_metadata(PIECES, {}, **unknown)
    for key in ("tokens", "token_type", "scores"):
        del metadata[f"tokenizer.ggml.{key}"][3 : 3 + 256]  # the byte tokens
    tokenizer = load_tokenizer(written(tmp_path, metadata))
    ids = tokenizer.encode("axéa a", add_special=False)
    assert _texts(tokenizer, ids) == ["▁a", expected, expected, "a", "▁a"]


def test_tokens_of_invalid_utf8_may_look_the_same(tmp_path: Path) -> None:
    metadata = bpe_metadata({"X1": NORMAL, "X2": NORMAL, "é": NORMAL, "X3": NORMAL, "<e>": CONTROL}, eos_token_id=102)
    path = tmp_path / "model.gguf"

    def vocabulary(*replacements: tuple[bytes, bytes]) -> Vocabulary:
        write_gguf(path, metadata)
        content = path.read_bytes()
        for old, new in replacements:
            content = content.replace(b"\2" + bytes(7) + old, len(new).to_bytes(8, "little") + new)
        path.write_bytes(content)
        with GgufFile.open(path) as gguf:
            return load_tokenizer(gguf).vocabulary

    two = vocabulary((b"X1", b"\xff"), (b"X2", b"\xfe"))
    assert (two.tokens[98:100], two.ids["\ufffd"], two.ids["X3"], two.eog_ids) == (["\ufffd"] * 2, 98, 101, {102})
    three = vocabulary((b"X1", b"\xff"), (b"X2", b"\xfe"), ("é".encode(), "\ufffd".encode()))
    assert three.ids["\ufffd"] == 100, "the token that is this character"
    with pytest.raises(ModelLoadFailed, match="ids 98 and 99 have the same"):
        vocabulary((b"X1", b"\xff"), (b"X2", b"\xff"))


def test_missing_parts_and_malformed_byte_tokens_are_named(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match=r"tokenizer\.ggml\.model"):
        load_tokenizer(written(tmp_path, {"general.architecture": "llama"}))
    without_scores = spm_metadata(PIECES, {})
    del without_scores["tokenizer.ggml.scores"]
    with pytest.raises(ModelLoadFailed, match="scores"):
        load_tokenizer(written(tmp_path, without_scores))
    malformed = spm_metadata(PIECES, {})
    malformed["tokenizer.ggml.tokens"][5] = "<0x-2>"
    with pytest.raises(ModelLoadFailed, match=r"tokens\[5\]"):
        load_tokenizer(written(tmp_path, malformed))


def test_a_piece_of_a_million_characters_is_refused_before_its_halves_are_looked_up(tmp_path: Path) -> None:
    with pytest.raises(ModelLoadFailed, match="token 261 has 1000000 characters; 1024 are allowed"):
        load_tokenizer(written(tmp_path, spm_metadata({"▁": -1.0, "a": -2.0, "a" * 10**6: -3.0}, {})))


def test_white_space_before_a_word_is_looked_at_once() -> None:
    """And not from each place of a run to its end, which for a million of them takes hours."""
    pre = pre_tokenizer("deepseek-llm")
    plain = Split(Regex(r"\s+$"), "isolated")
    fast = Split(Regex(pre.patterns[3]), "isolated")
    for text in ("a  ", "\n", "  a", "a \t b \u2028 ", "", "  \u3000", "x \x85  y  "):  # lines are cut before
        assert fast.pre_tokenize_str(text) == plain.pre_tokenize_str(text)
    assert len(fast.pre_tokenize_str(" " * 10**6 + "中")) == 1


def test_every_pre_tokenizer_keeps_all_text(tmp_path: Path) -> None:
    """Each rule's expressions compile, and cutting a text into words loses nothing of it."""
    with GgufFile.open(DATA / "small-bpe.gguf") as gguf:
        metadata = {k: v.decode_all() if hasattr(v, "decode_all") else v for k, v in gguf.metadata.items()}
    text = "It's 12345 x+y==z, naïve 中文ABC def\n\n \t 🦙 e\u0301 don'T\r\n  end "
    for name, rule in PRE_TOKENIZERS.items():
        tokenizer = load_tokenizer(written(tmp_path, metadata | {"tokenizer.ggml.pre": name}))
        expected = unicodedata.normalize("NFC", text) if rule.composes else text
        assert tokenizer.decode(tokenizer.encode(text, add_special=False)) == expected, name


@pytest.mark.parametrize(
    ("name", "text", "words"),
    [
        ("llama-bpe", "It'S 12345", ["It", "'S", "Ġ", "123", "45"]),
        ("qwen2", "It'S 123", ["It", "'S", "Ġ", "1", "2", "3"]),
        ("gpt-2", "It's 123  x", ["It", "'s", "Ġ123", "Ġ", "Ġx"]),
        ("gpt-4o", "fooBar we'll 1234 a//\n", ["foo", "Bar", "Ġwe'll", "Ġ", "123", "4", "Ġa", "//Ċ"]),
        ("starcoder", "a 12", ["a", "Ġ", "1", "2"]),
        ("falcon", "a 12345!", ["a", "Ġ", "123", "45", "!"]),
        ("deepseek-v3", "1234.foo", ["123", "4", ".foo"]),
        ("tekken", "fooBar 12", ["foo", "Bar", "Ġ", "1", "2"]),
        ("default", "a 1234!", ["a", "Ġ", "123", "4", "!"]),
    ],
)
def test_words(tmp_path: Path, name: str, text: str, words: list[str]) -> None:
    tokenizer = _bpe(tmp_path, {}, pre=name)
    assert tokenizer._words(text) == words
    assert pre_tokenizer(name).whole_words == (name in ("llama-bpe", "tekken"))


@pytest.mark.parametrize("name", ["small-bpe", "small-spm"])
@pytest.mark.parametrize(
    "text", ["a" * 131_072, " " * 131_072, "1" * 131_072, "中文" * 65_536, " \n" * 131_072, "<|" * 131_072],
    ids=["letters", "spaces", "digits", "CJK", "white space", "signs"],
)  # fmt: skip
def test_long_uniform_texts_take_linear_time(name: str, text: str) -> None:
    with GgufFile.open(DATA / f"{name}.gguf") as gguf:
        tokenizer = load_tokenizer(gguf)
    start = time.perf_counter()
    assert tokenizer.decode(tokenizer.encode(text)).endswith(text[-100:])
    assert time.perf_counter() - start < 5


@pytest.mark.parametrize("name", ["small-bpe", "small-spm"])
def test_a_long_text_leaves_the_lock_to_others_and_gives_the_same_ids(name: str) -> None:
    with GgufFile.open(DATA / f"{name}.gguf") as gguf:
        tokenizer = load_tokenizer(gguf)
    tokenizer.prepare()
    text = "1234 ab 漢字\n" * 50_000
    library: HfTokenizer = tokenizer._library if isinstance(tokenizer, BpeTokenizer) else tokenizer._tokenizer
    spelled = text if isinstance(tokenizer, BpeTokenizer) else "▁" + text.replace(" ", "▁")
    expected = library.encode(spelled, add_special_tokens=False).ids
    has_ended, num_turns = threading.Event(), 0

    def take_turns() -> None:
        nonlocal num_turns
        while not has_ended.wait(0.001):
            num_turns += 1

    other = threading.Thread(target=take_turns)
    other.start()
    ids = tokenizer.encode(text, add_special=False)
    has_ended.set()
    other.join()
    assert ids == expected
    assert num_turns >= 10


class _Counting(ByteTokenizer):
    def __init__(self) -> None:
        self.num_chars: list[int] = []

    def encode(self, text: str, add_special: bool = True, parse_special: bool = True) -> list[int]:
        self.num_chars.append(len(text))
        return super().encode(text.replace(" " * 100, " "), add_special, parse_special)


@pytest.mark.parametrize(
    ("text", "num_ids", "num_chars"),
    [
        ("x" * 2000, 2000, [2000]),
        ("x" * 2**16, 2**16, [2**16]),
        ("x" * 2**20, None, [2**16]),
        (" " * 2**18, 2665, [2**16, 2**18]),
        (" " * 2**16 + "x" * 2**20, None, [2**16, 5 * 2**16]),
    ],
)
def test_a_text_far_above_the_limit_is_not_read_to_its_end(
    text: str, num_ids: int | None, num_chars: list[int]
) -> None:
    tokenizer = _Counting()
    ids = encode_within(tokenizer, text, 1000)
    assert (None if ids is None else len(ids)) == num_ids
    assert tokenizer.num_chars == num_chars


def test_a_mebibyte_of_text() -> None:
    text = ("The old pond lies still; 12 frogs jump in. 古い池に蛙が飛びこんで。 " * 20_000)[: 2**20]
    with GgufFile.open(DATA / "small-bpe.gguf") as gguf:
        tokenizer = load_tokenizer(gguf)
    start = time.perf_counter()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert time.perf_counter() - start < 10


def _write_json(folder: Path, library: HfTokenizer) -> Path:
    path = folder / "tokenizer.json"
    path.write_text(library.to_str(), encoding="utf-8")
    return path


def _library(tokenizer: BpeTokenizer) -> HfTokenizer:
    """The same tokenizer as a tokenizer.json would hold it."""
    library = HfTokenizer.from_str(tokenizer._library.to_str())
    special = [AddedToken(tokenizer.vocabulary.tokens[i], special=True) for i in sorted(tokenizer.vocabulary.control)]
    library.add_special_tokens(special)
    return library


def test_tokenizer_json_beside_the_model(tmp_path: Path) -> None:
    extra = {"<s>": CONTROL, "<|end|>": CONTROL, "[PAD100]": UNUSED}
    metadata = bpe_metadata(extra, bos_token_id=98, eos_token_id=99, add_bos_token=True)
    plain = _bpe(tmp_path, extra, bos_token_id=98, eos_token_id=99, add_bos_token=True)
    library = _library(plain)
    library.enable_truncation(512)  # what training may leave in such a file
    library.enable_padding(length=64)
    _write_json(tmp_path, library)
    tokenizer = load_tokenizer(written(tmp_path, metadata))
    assert tokenizer.kind == "hf-json"
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.eog_ids) == (98, 99, {99})
    for text in ("hello hell", "<s>he<|end|>", "", " he \n he", "<|end|><|end", "<s>hello <|end|>" * 1000):
        for parse in (True, False):
            assert tokenizer.encode(text, parse_special=parse) == plain.encode(text, parse_special=parse)
    assert tokenizer.decode(tokenizer.encode("hello<|end|>")) == "hello"


def test_tokenizer_json_of_another_model_is_refused(tmp_path: Path) -> None:
    extra = {"<s>": CONTROL, "<e>": CONTROL}
    other = json.loads(_library(_bpe(tmp_path, extra)).to_str())
    swapped = {"h": other["model"]["vocab"]["e"], "e": other["model"]["vocab"]["h"]}
    other["model"]["vocab"] |= swapped
    gguf = written(tmp_path, bpe_metadata(extra))
    path = tmp_path / "other.json"
    path.write_text(json.dumps(other))
    with pytest.raises(ModelLoadFailed, match="belongs to another model"):
        load_tokenizer(gguf, path)
    path.write_text(_library(_bpe(tmp_path, {**extra, "<more>": CONTROL})).to_str())
    with pytest.raises(ModelLoadFailed, match="101 tokens, the model file 100"):
        load_tokenizer(gguf, path)
    path.write_text("{}")
    with pytest.raises(ModelLoadFailed, match=r"is not a tokenizer\.json"):
        load_tokenizer(gguf, path)
    with pytest.raises(ModelLoadFailed, match="cannot be opened: No such file"):
        load_tokenizer(gguf, tmp_path / "absent.json")


def test_tokenizer_json_must_be_a_regular_file_of_some_size(tmp_path: Path) -> None:
    gguf = written(tmp_path, bpe_metadata({}))
    os.mkfifo(tmp_path / "fifo")
    start = time.monotonic()
    with pytest.raises(ModelLoadFailed, match=r"is a FIFO, a tokenizer\.json must be a regular file"):
        load_tokenizer(gguf, tmp_path / "fifo")
    with pytest.raises(ModelLoadFailed, match="is a character device"):
        load_tokenizer(gguf, Path("/dev/zero"))
    assert time.monotonic() - start < 1
    path = tmp_path / "large.json"
    path.touch()
    os.truncate(path, MAX_JSON_BYTES + 1)
    with pytest.raises(ModelLoadFailed, match=r"large\.json has more than 67108864 bytes"):
        load_tokenizer(gguf, path)
