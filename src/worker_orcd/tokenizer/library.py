"""The `tokenizers` library, asked in a way that lets other threads go on."""

from __future__ import annotations

import os
from typing import Final

from tokenizers import Tokenizer as HfTokenizer

_SHORT: Final = 4096  # characters, some 1 ms; getting Python's lock back may take longer


def use_one_thread() -> None:
    """Keep the library from starting a thread for each core, unless the environment wants that."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def library_ids(library: HfTokenizer, text: str) -> list[int]:
    """Ids of a text, no special tokens added. `encode` would keep Python's lock, for seconds if the text is long."""
    ids: list[int]
    if len(text) <= _SHORT:
        ids = library.encode(text, add_special_tokens=False).ids
    else:
        ids = library.encode_batch_fast([text], add_special_tokens=False)[0].ids
    return ids
