"""Checkpoint to GGUF: write float32 with this project's writer, quantize with llama.cpp.

python export.py --checkpoint DIR --out haiku.gguf [--type Q4_K_M | --type F32]
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from config import Config
from safetensors.numpy import load_file

from worker_orcd.gguf.types import GgmlType
from worker_orcd.gguf.writer import write_gguf

NORMAL, CONTROL = 1, 3
FILE_TYPE_F32, FILE_TYPE_Q4_K_M = 0, 15
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)


def tokenizer_metadata(path: Path) -> dict[str, Any]:
    """`tokenizer.*` keys from a tokenizer.json of byte-level BPE."""
    content = json.loads(path.read_text(encoding="utf-8"))
    ids = content["model"]["vocab"] | {added["content"]: added["id"] for added in content["added_tokens"]}
    special = {added["content"] for added in content["added_tokens"]}
    tokens = sorted(ids, key=ids.__getitem__)
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in content["model"]["merges"]]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if token in special else NORMAL for token in tokens],
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.bos_token_id": ids["<|endoftext|>"],
        "tokenizer.ggml.eos_token_id": ids["<|im_end|>"],
        "tokenizer.ggml.padding_token_id": ids["<|endoftext|>"],
        "tokenizer.ggml.add_bos_token": False,
        "tokenizer.chat_template": CHAT_TEMPLATE,
    }


def model_metadata(config: Config) -> dict[str, Any]:
    """`general.*` and `qwen2.*` keys."""
    return {
        "general.architecture": "qwen2",
        "general.type": "model",
        "general.name": "haiku",
        "general.author": "worker-orcd",
        "general.description": "Answers anything with a haiku. Trained on a grammar, not on texts.",
        "general.license": "apache-2.0",
        "general.size_label": "7M",
        "general.file_type": FILE_TYPE_F32,
        "qwen2.context_length": config.context,
        "qwen2.embedding_length": config.width,
        "qwen2.block_count": config.layers,
        "qwen2.feed_forward_length": config.hidden,
        "qwen2.attention.head_count": config.heads,
        "qwen2.attention.head_count_kv": config.kv_heads,
        "qwen2.attention.layer_norm_rms_epsilon": config.norm_eps,
        "qwen2.rope.freq_base": config.rope_base,
    }


def tensors(checkpoint: Path) -> Iterator[tuple[str, tuple[int, ...], GgmlType, np.ndarray]]:
    """The checkpoint's tensors in float32; their names are GGUF's already."""
    for name, values in sorted(load_file(checkpoint).items()):
        yield name, values.shape, GgmlType.F32, np.ascontiguousarray(values, np.float32)


def quantize(source: Path, target: Path) -> None:
    """Q4_K_M by llama.cpp. Raises RuntimeError when it refuses."""
    import llama_cpp

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = FILE_TYPE_Q4_K_M
    code = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), params)
    if code:
        raise RuntimeError(f"quantizing {source}: llama.cpp returned {code}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", type=Path, required=True, help="folder that train.py wrote")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--type", choices=("Q4_K_M", "F32"), default="Q4_K_M")
    args = parser.parse_args()
    metadata = model_metadata(Config()) | tokenizer_metadata(args.checkpoint / "tokenizer.json")
    with tempfile.TemporaryDirectory() as scratch:
        plain = args.out if args.type == "F32" else Path(scratch) / "haiku-f32.gguf"
        write_gguf(plain, metadata, tensors(args.checkpoint / "model.safetensors"))
        if args.type == "Q4_K_M":
            quantize(plain, args.out)
    print(f"{args.out}: {args.out.stat().st_size} bytes")


if __name__ == "__main__":
    main()
