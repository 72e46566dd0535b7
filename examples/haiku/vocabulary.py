"""The model's vocabulary: byte-level BPE over the corpus, split by the qwen2 pattern."""

from __future__ import annotations

import itertools
import re

import corpus
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCAB_SIZE = 3072
SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
_MARKS = re.compile("|".join(map(re.escape, SPECIALS)))
_SPLIT = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def train_tokenizer(num_samples: int = 20_000, seed: int = 7) -> Tokenizer:
    """A tokenizer of VOCAB_SIZE tokens: 256 bytes, merges, then the specials, which come last."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_SPLIT), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE - len(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    drawn = itertools.islice(corpus.samples(seed), num_samples)
    texts = ("".join(text for text, _ in sample) for sample in drawn)
    tokenizer.train_from_iterator((part for text in texts for part in _MARKS.split(text)), trainer)
    tokenizer.add_special_tokens(list(SPECIALS))
    return tokenizer
