"""How near a model's logits are to the float32 truth on the same device: KL divergence a token, same likeliest token.

A prompt of random ids goes through the CUDA backend in chunks, then 50 tokens one a step, each the likeliest. The
reference in float32, on the weights the file stores, reads the same text. Its matrices are widened one at a time, so
it needs little more room than the file. One JSON line last.

--compare gives the same figures of another engine, on the prompt: of llama.cpp on the CPU, where llama-cpp-python is
installed, or of any that wrote its logits to a file, float32 [tokens, vocabulary] and nothing else. --export writes
what that engine is to read: the model of so many layers, and the prompt's ids. Neither needs a GPU; without one
keep to a few layers.

Random weights under a head that is also the embedding are all but certain of every token, whatever is lost on the way
to it; for those unit_kl is the figure to look at.

python benchmarks/bench_fidelity.py --model synthetic:llama-3.1-8b:Q4_K_M [MODEL ...] [--layers N] [--tokens N]
python benchmarks/bench_fidelity.py --model synthetic:llama-3.1-8b:Q4_K_M --layers 2 --export FOLDER
python benchmarks/bench_fidelity.py --model FOLDER/model.gguf --compare FILE
"""

from __future__ import annotations

import argparse
import gc
import math
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from results import add_out, finish
from rich.console import Console
from torch import Tensor

from worker_orcd.assemble import _adapter
from worker_orcd.backends.base import Backend, Experts, Operand, PackedWeight, Projection, Sums
from worker_orcd.backends.batch import token_ids
from worker_orcd.backends.cuda import CudaBackend
from worker_orcd.backends.torch_ref import TorchBackend, dequantize
from worker_orcd.commands.bench import synthetic_model
from worker_orcd.engine.pack import pack
from worker_orcd.engine.request import Request, SamplingParams
from worker_orcd.engine.runtime import Runtime
from worker_orcd.engine.sequence import Chunk, Sequence
from worker_orcd.gguf.metadata import StringArray
from worker_orcd.gguf.reader import GgufFile
from worker_orcd.gguf.types import GgmlType
from worker_orcd.gguf.writer import write_gguf
from worker_orcd.kv.paged import PagedAllocator
from worker_orcd.kv.pool import KVShape, allocate_pool, eraser
from worker_orcd.kv.prefix import PrefixChain
from worker_orcd.models.spec import read_spec
from worker_orcd.models.tensors import tensor_table, use_gguf_names
from worker_orcd.models.weights import load_weights
from worker_orcd.synthetic import parse_name, write_synthetic

STEPS, CHUNK, BLOCK_SIZE = 50, 512, 32
LLAMA_CPP = "llama.cpp"
READ_BYTES = 2**24
PIECE_ROWS = 16  # of logits compared at once


class Reference(TorchBackend):
    """Keeps weights as the file stores them, and widens a matrix when it is used."""

    def pack(self, raw: Tensor, type: GgmlType, shape: tuple[int, int], count: int = 1) -> PackedWeight:  # noqa: ARG002
        return PackedWeight(type, shape, (raw.view(shape[0], -1),))

    def embed(self, tokens: Tensor, table: PackedWeight, sampled: Tensor | None = None) -> Tensor:
        rows = table.parts[0][token_ids(tokens, sampled)].flatten()
        return dequantize(rows, table.type).view(len(tokens), table.shape[1])

    def _product(self, x: Tensor, weight: PackedWeight) -> Tensor:
        return super()._product(x, widened(weight))

    def experts(self, x: Operand, experts: Experts) -> Sums:
        gate_up, down = (_widened(projection) for projection in (experts.gate_up, experts.down))
        return super().experts(x, replace(experts, gate_up=gate_up, down=down))


def widened(weight: PackedWeight) -> PackedWeight:
    (part,) = weight.parts
    if part.dtype == torch.float32:
        return weight
    matrix = dequantize(part.flatten(), weight.type).view(weight.shape)
    return PackedWeight(GgmlType.F32, weight.shape, (matrix,))


def _widened(projection: Projection) -> Projection:
    return tuple((widened(weight), bias) for weight, bias in projection)


def load(path: Path, backend: Backend, num_tokens: int, dtype: torch.dtype) -> Runtime:
    """The file on `backend`, with a cache of `dtype` for one sequence of `num_tokens`."""
    with GgufFile.open(path) as gguf:
        use_gguf_names(gguf)
        spec = read_spec(gguf)
        weights = load_weights(gguf, tensor_table(spec, gguf.tensors), backend, 2**20, lambda *_: None)
    blocks = -(-num_tokens // BLOCK_SIZE)
    kv = allocate_pool(
        KVShape(spec.num_layers, blocks, BLOCK_SIZE, spec.num_kv_heads, spec.head_dim, dtype), backend.device
    )
    adapter = _adapter(spec)(spec, weights, backend, num_tokens)
    return Runtime(adapter, kv, PagedAllocator(blocks, BLOCK_SIZE, eraser(kv), share=False), backend.device)


@torch.inference_mode()
def read(runtime: Runtime, prompt: list[int], steps: int, chunk: int) -> tuple[list[int], Tensor]:
    """The prompt `chunk` tokens a step, then `steps` of the likeliest: all ids, and logits after each, f32 [T, V]."""
    request = Request("fidelity", prompt, max_tokens=max(1, steps), sampling=SamplingParams(seed=0))
    seq = Sequence.of(request, 0, PrefixChain(b"", BLOCK_SIZE))
    seq.table = runtime.allocator.new_table()
    runtime.allocator.grow(seq.table, len(prompt) + steps)
    rows = list[Tensor]()
    while seq.num_computed < len(prompt) + steps:
        count = min(chunk, seq.num_pending)
        part = Chunk(seq, seq.num_computed, count, samples=count == seq.num_pending, scores=True)
        logits = runtime.adapter.forward(pack([part], runtime.device), runtime.kv)
        rows.append(logits.cpu())
        seq.num_computed += count
        if not seq.num_pending and len(seq.tokens) < len(prompt) + steps:
            seq.tokens.append(int(logits[-1].argmax()))
    return seq.tokens, torch.cat(rows)


def distance(found: Tensor, truth: Tensor, device: torch.device) -> dict[str, float]:
    """KL(truth ‖ found) in nats, mean and percentiles over tokens; share of tokens whose likeliest is the same.

    unit_kl: with the logits of both divided by the deviation of the truth's; logit_error: relative, of all logits.
    """
    unit, losses, agree, lost = float(truth.std()), list[Tensor](), 0, 0.0
    for start in range(0, len(truth), PIECE_ROWS):
        a, b = (x[start : start + PIECE_ROWS].to(device).double() for x in (truth, found))
        agree += int((a.argmax(-1) == b.argmax(-1)).sum())
        lost += float((b - a).square().sum())
        losses.append(torch.stack([divergence(a, b), divergence(a / unit, b / unit)]).cpu())
    numbers = {"top1": agree / len(truth), "logit_error": math.sqrt(lost) / float(truth.norm())}
    for name, loss in zip(("kl", "unit_kl"), torch.cat(losses, 1).numpy(), strict=True):
        numbers |= {f"{name}_mean": float(loss.mean())}
        numbers |= {f"{name}_p{percent}": float(np.percentile(loss, percent)) for percent in (50, 99)}
    assert all(map(math.isfinite, numbers.values())), "logits are not finite"
    return {name: float(f"{number:.4g}") for name, number in numbers.items()}


def divergence(truth: Tensor, found: Tensor) -> Tensor:
    p, q = truth.log_softmax(-1), found.log_softmax(-1)
    return (p.exp() * (p - q)).sum(-1)


def compare(path: Path, backend: Backend | None, num_tokens: int, other: str | None) -> dict[str, Any]:
    """Against the reference: `backend` of the prompt and of the tokens that follow it, `other` of the prompt."""
    ids = prompt = random_ids(path, num_tokens)
    device, numbers = torch.device("cpu"), dict[str, Any]()
    if backend is not None:
        device = backend.device
        ids, found = read(load(path, backend, num_tokens + STEPS, torch.float16), prompt, STEPS, CHUNK)
    truth = truth_of(path, device, ids)
    if backend is not None:
        numbers["prefill"] = distance(found[:num_tokens], truth[:num_tokens], device)
        numbers["decode"] = distance(found[num_tokens:], truth[num_tokens:], device)
    if other is not None:
        answers = llama_logits(path, prompt) if other == LLAMA_CPP else stored_logits(other, truth[:num_tokens])
        numbers["other"] = distance(answers, truth[:num_tokens], device)
    return numbers


def truth_of(path: Path, device: torch.device, ids: list[int]) -> Tensor:
    gc.collect()
    torch.cuda.empty_cache()  # what held the model before is the reference's now
    return read(load(path, Reference(device), len(ids), torch.float32), ids, 0, CHUNK)[1]


def random_ids(path: Path, count: int) -> list[int]:
    with GgufFile.open(path) as gguf:
        use_gguf_names(gguf)
        spec = read_spec(gguf)
    if count + STEPS > spec.context_length:
        raise SystemExit(f"--tokens {count} and {STEPS} steps; the model takes {spec.context_length} tokens")
    return torch.randint(0, spec.vocab_size, (count,), generator=torch.Generator().manual_seed(0)).tolist()


def llama_logits(path: Path, ids: list[int]) -> Tensor:
    """By llama.cpp on the CPU, as it comes."""
    import llama_cpp

    nameless = {"general.name": ""}  # a synthetic file called phi-3 lacks tokens that llama.cpp then looks for
    model = llama_cpp.Llama(
        str(path), n_ctx=len(ids) + 8, n_gpu_layers=0, logits_all=True, verbose=False, kv_overrides=nameless
    )
    model.eval(ids)
    return torch.from_numpy(np.array(model.scores[: len(ids)], dtype=np.float32))


def stored_logits(file: str, like: Tensor) -> Tensor:
    """Those in a file of float32 numbers, as many as `like` has."""
    numbers = np.fromfile(file, dtype=np.float32)
    if len(numbers) != like.numel():
        raise SystemExit(f"{file} holds {len(numbers)} numbers, not {len(like)} tokens × {like.shape[1]}")
    return torch.from_numpy(numbers).view_as(like)


def write_cut(source: Path, target: Path, num_layers: int) -> None:
    """The first layers of a model, with its embedding and head."""
    with GgufFile.open(source) as gguf:
        use_gguf_names(gguf)
        whole = read_spec(gguf).num_layers
        num_layers = min(num_layers, whole)
        metadata = {key: _cut_value(value, whole, num_layers) for key, value in gguf.metadata.items()}
        metadata[f"{gguf.architecture}.block_count"] = num_layers
        kept = [info for info in gguf.tensors.values() if _layer_of(info.name) < num_layers]

        def pieces(name: str, nbytes: int) -> Iterator[bytes]:
            for start in range(0, nbytes, READ_BYTES):
                yield bytes(gguf.read(name, None, start, min(READ_BYTES, nbytes - start)))

        rows = [(i.name, i.shape, i.type, lambda i=i: pieces(i.name, i.nbytes)) for i in kept]
        write_gguf(target, metadata, rows)


def _cut_value(value: Any, whole: int, num_layers: int) -> Any:
    if isinstance(value, StringArray):
        return list(value)
    return value[:num_layers] if isinstance(value, np.ndarray) and len(value) == whole else value


def _layer_of(name: str) -> int:
    return int(name.split(".")[1]) if name.startswith("blk.") else 0


def model_file(model: str, num_layers: int | None, folder: Path) -> Path:
    """The file `model` names, or, in `folder`, one of so many layers: the first, or of a synthetic model made so."""
    kind, _, name = model.partition(":")
    is_synthetic, target = kind == "synthetic", folder / "model.gguf"
    if num_layers is None:
        return synthetic_model(name, Console(stderr=True)) if is_synthetic else Path(model)
    if is_synthetic:
        write_synthetic(target, *parse_name(name), layers=num_layers)
    else:
        write_cut(Path(model), target, num_layers)
    return target


def export(args: argparse.Namespace) -> None:
    args.export.mkdir(parents=True, exist_ok=True)
    path, target = model_file(args.model[0], args.layers, args.export), args.export / "ids.txt"
    target.write_text(" ".join(map(str, random_ids(path, args.tokens))) + "\n")
    print(f"{path} is to read the {args.tokens} tokens in {target}")


def measure(args: argparse.Namespace) -> None:
    needs_gpu = args.compare is None or torch.cuda.is_available()
    backend = CudaBackend(torch.device("cuda", 0)) if needs_gpu else None
    numbers = dict[str, Any]()
    for model in args.model:
        with tempfile.TemporaryDirectory() as folder:
            path = model_file(model, args.layers, Path(folder))
            numbers[model.removeprefix("synthetic:")] = compare(path, backend, args.tokens, args.compare)
    settings = {"layers": args.layers, "tokens": args.tokens, "steps": STEPS, "compare": args.compare}
    finish("fidelity", settings, numbers, args.out)


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, nargs="+", help="GGUF files, or synthetic:NAME:QUANT")
    parser.add_argument("--layers", type=int, help="only so many of its layers (default: all)")
    parser.add_argument("--tokens", type=int, default=512, help="prompt tokens (default 512)")
    parser.add_argument("--compare", metavar="FILE", help=f"a file of another engine's logits, or {LLAMA_CPP}")
    parser.add_argument("--export", type=Path, metavar="FOLDER", help="write model.gguf and ids.txt; measure nothing")
    add_out(parser)
    args = parser.parse_args(arguments)
    if len(args.model) > 1 and (args.export or args.compare not in (None, LLAMA_CPP)):
        parser.error("--export and a file of logits are for one model")
    measure(args) if args.export is None else export(args)


if __name__ == "__main__":
    main()
