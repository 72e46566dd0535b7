"""Choose and build the tokenizer of a model."""

from __future__ import annotations

from pathlib import Path

from worker_orcd.errors import ModelLoadFailed
from worker_orcd.gguf.access import TypedAccess
from worker_orcd.tokenizer.base import VocabularyTokenizer
from worker_orcd.tokenizer.bpe import BpeTokenizer
from worker_orcd.tokenizer.hf_json import HfJsonTokenizer
from worker_orcd.tokenizer.library import use_one_thread
from worker_orcd.tokenizer.spm import SpmTokenizer


def load_tokenizer(gguf: TypedAccess, tokenizer_json: Path | None = None) -> VocabularyTokenizer:
    """The tokenizer of an opened GGUF file.

    A `tokenizer.json`, given or found beside the model file, encodes text (kind "hf-json") once its vocabulary has
    been found equal to the file's; otherwise all comes from the file (kind "gguf-bpe"). Raises ModelLoadFailed
    for a tokenizer that is not supported, malformed, or at odds with the file.
    """
    use_one_thread()
    beside = gguf.path.parent / "tokenizer.json"
    path = tokenizer_json or (beside if beside.is_file() else None)
    if path is not None:
        return HfJsonTokenizer(gguf, path)
    model = gguf.require("tokenizer.ggml.model", str)
    match model:
        case "gpt2":
            return BpeTokenizer(gguf)
        case "llama":
            return SpmTokenizer(gguf)
    raise ModelLoadFailed(f"tokenizer.ggml.model {model[:64]!r} is not supported; known are gpt2 and llama")
