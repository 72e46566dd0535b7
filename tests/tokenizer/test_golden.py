"""Ids equal to those of other implementations, for published vocabularies and for two small ones."""

from __future__ import annotations

import json
import time
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.tokenizer.vocabularies import DATA, PUBLISHED, golden, unpack
from worker_orcd.gguf.reader import GgufFile
from worker_orcd.tokenizer.base import VocabularyTokenizer
from worker_orcd.tokenizer.load import load_tokenizer

END_IDS = {
    "qwen2": {151643, 151645},
    "phi-3": {2, 32000, 32007},
    "gpt-2": {50256},
    "llama-bpe": {128001, 128009},
    "llama-spm": {2},
}


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
    for is_prepared in (False, True):
        if is_prepared:
            tokenizer.prepare()
        for text, ids in golden(name):
            assert tokenizer.encode(text, add_special=False, parse_special=False) == ids, (name, text)
            prefix = " " if text and tokenizer.model == "spm" else ""
            assert tokenizer.decode(ids) == prefix + text


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
