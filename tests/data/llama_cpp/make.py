"""Make the stored logits of this folder: tiny models quantized and run by llama.cpp.

    python tests/data/llama_cpp/make.py            (from the project's root)

Needs llama-cpp-python beside the project's own dev requirements; run once, the results are committed.
"""

from __future__ import annotations

import ctypes
from pathlib import Path

import llama_cpp
import numpy as np

from tests import tiny
from worker_orcd.assemble import embedded_model

HERE = Path(__file__).parent
IDS = [5, 17, 203, 64, 99, 131, 7, 250, 301, 12, 12, 45, 88, 160, 222, 3]
SIZES = {"hidden_size": 256, "intermediate_size": 512, "head_dim": 64}
QUANTS = {"llama": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0, "phi3": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_K_M}


def quantize(source: Path, target: Path, kind: int) -> None:
    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype = kind
    status = llama_cpp.llama_model_quantize(str(source).encode(), str(target).encode(), ctypes.byref(params))
    assert status == 0, status


def logits(path: Path) -> np.ndarray:
    """float32 [tokens, vocab], with a float32 cache and without flash attention."""
    model = llama_cpp.Llama(str(path), n_ctx=64, logits_all=True, type_k=0, type_v=0, flash_attn=False, verbose=False)
    model.eval(IDS)
    return np.array(model.scores[: len(IDS)], dtype=np.float32)


def main() -> None:
    answers = {"haiku": logits(embedded_model())}
    for case, kind in QUANTS.items():
        plain = tiny.build(case, **SIZES).write(HERE / f"{case}-f32.gguf")
        quantize(plain, HERE / f"{case}.gguf", kind)
        plain.unlink()
        answers[case] = logits(HERE / f"{case}.gguf")
    np.savez_compressed(HERE / "logits.npz", ids=np.array(IDS), **answers)
    print(llama_cpp.__version__, {name: x.shape for name, x in answers.items()})


if __name__ == "__main__":
    main()
