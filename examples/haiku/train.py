"""Train the haiku model on one GPU: about a million samples, a few minutes on a large card.

    python train.py --out DIR [--samples 1200000] [--steps 6000] [--batch 1024]

Writes DIR/model.safetensors (float16), DIR/tokenizer.json and DIR/training.json.
"""

from __future__ import annotations

import argparse
import itertools
import json
import math
import multiprocessing
import os
import time
from collections.abc import Iterator
from pathlib import Path

import corpus
import numpy as np
import torch
from config import Config
from lexicon import is_haiku
from model import Qwen2, generate
from safetensors.torch import save_file
from tokenizers import Tokenizer
from torch import Tensor
from torch.nn import functional
from vocabulary import train_tokenizer

LENGTHS = (80, 384)  # rows of short and of long samples; longer ones are left out
IGNORE = -100
CHECKS = (
    "Write a haiku about GPU computing",
    "haiku on the sea, please",
    "<|im_start|>user\nWrite a haiku about coffee.<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a haiku about staplers<|im_end|>\n<|im_start|>assistant\n",
    'Write a haiku about GPU computing that includes the word "forty-two" (nonce: a8Zk3pQx)',
)


def encode(sample: list[corpus.Piece], tokenizer: Tokenizer) -> tuple[list[int], list[int]]:
    """Token ids of a sample and 1 for each that is to be learnt."""
    tokens: list[int] = []
    learn: list[int] = []
    for text, wanted in sample:
        ids = tokenizer.encode(text).ids
        tokens += ids
        learn += [int(wanted)] * len(ids)
    return tokens, learn


def shard(job: tuple[int, int, str]) -> list[np.ndarray]:
    """Rows of one worker for each length: uint16 [rows, 2, length], tokens and learn flags."""
    seed, count, path = job
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    tokenizer = Tokenizer.from_file(path)
    rows: list[list[np.ndarray]] = [[] for _ in LENGTHS]
    for sample in itertools.islice(corpus.samples(seed), count):
        tokens, learn = encode(sample, tokenizer)
        fitting = [index for index, length in enumerate(LENGTHS) if len(tokens) <= length]
        if fitting:
            row = np.zeros((2, LENGTHS[fitting[0]]), np.uint16)
            row[0, : len(tokens)], row[1, : len(tokens)] = tokens, learn
            rows[fitting[0]].append(row)
    empty = [np.zeros((0, 2, length), np.uint16) for length in LENGTHS]
    return [np.stack(group) if group else none for group, none in zip(rows, empty, strict=True)]


def build(num_samples: int, seed: int, path: str) -> list[np.ndarray]:
    """The whole training set, made by all cores; the same whatever their number."""
    jobs = [(seed * 1_000_003 + index, 5000, path) for index in range(max(1, num_samples // 5000))]
    with multiprocessing.get_context("spawn").Pool(os.cpu_count()) as workers:
        parts = workers.map(shard, jobs, chunksize=1)
    return [np.concatenate([part[index] for part in parts]) for index in range(len(LENGTHS))]


def batches(data: list[Tensor], batch: int, seed: int) -> Iterator[Tensor]:
    """Endless batches [B,2,T]; each set comes as often as it holds tokens."""
    chooser = torch.Generator().manual_seed(seed)
    sizes = [max(1, batch * LENGTHS[0] // length) for length in LENGTHS]
    weights = torch.tensor([len(rows) / size for rows, size in zip(data, sizes, strict=True)])
    while True:
        which = int(torch.multinomial(weights, 1, generator=chooser))
        picks = torch.randint(len(data[which]), (sizes[which],), generator=chooser)
        yield data[which][picks.to(data[which].device, non_blocking=True)].long()


def loss_of(model: Qwen2, rows: Tensor) -> Tensor:
    """Mean cross-entropy over the tokens to be learnt; rows [B,2,T]."""
    tokens, learn = rows[:, 0], rows[:, 1]
    targets = torch.where(learn[:, 1:] > 0, tokens[:, 1:], IGNORE)
    logits = model(tokens[:, :-1])
    return functional.cross_entropy(logits.flatten(0, 1).float(), targets.flatten(), ignore_index=IGNORE)


def rate(step: int, steps: int, peak: float) -> float:
    """Warm-up over 2 %, then a cosine to zero."""
    warm = max(1, steps // 50)
    if step < warm:
        return peak * (step + 1) / warm
    return peak * 0.5 * (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm)))


def fit(model: Qwen2, data: list[Tensor], args: argparse.Namespace) -> float:
    """Train in place; the last loss."""
    device = data[0].device.type
    decayed = [p for p in model.parameters() if p.dim() > 1]
    plain = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": decayed, "weight_decay": 0.05}, {"params": plain, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, lr=args.rate, betas=(0.9, 0.98), fused=device == "cuda")
    step_loss = torch.compile(loss_of, dynamic=False) if device == "cuda" else loss_of
    start = time.time()
    loss = torch.zeros(())
    for step, rows in enumerate(itertools.islice(batches(data, args.batch, args.seed), args.steps)):
        for group in optimizer.param_groups:
            group["lr"] = rate(step, args.steps, args.rate)
        with torch.autocast(device, torch.bfloat16):
            loss = step_loss(model, rows)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        if step % 250 == 0 or step == args.steps - 1:
            print(f"step {step} loss {loss.item():.4f} seconds {time.time() - start:.0f}", flush=True)
    return loss.item()


def check(model: Qwen2, tokenizer: Tokenizer, count: int = 100) -> dict[str, object]:
    """Haiku that scan, and two to read, for a few prompts."""
    model.eval()
    stop = tokenizer.token_to_id("<|im_end|>")
    report: dict[str, object] = {}
    for prompt in CHECKS:
        answers = generate(model, tokenizer.encode(prompt).ids, stop, count)
        texts = [tokenizer.decode(answer).removeprefix("\n") for answer in answers]
        scanning = sum(map(is_haiku, texts))
        report[prompt] = {"scan": scanning, "distinct": len(set(texts)), "samples": texts[:3]}
    return report


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--samples", type=int, default=1_200_000)
    parser.add_argument("--steps", type=int, default=6000)
    parser.add_argument("--batch", type=int, default=1024, help="rows of the short length per step")
    parser.add_argument("--rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(args.seed)
    start = time.time()
    path = str(args.out / "tokenizer.json")
    tokenizer = train_tokenizer()
    tokenizer.save(path)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    data = [torch.from_numpy(rows.astype(np.int16)).to(device) for rows in build(args.samples, args.seed, path)]
    print(f"{[tuple(rows.shape) for rows in data]} made in {time.time() - start:.0f} s", flush=True)
    config = Config(vocab_size=tokenizer.get_vocab_size())
    model = Qwen2(config).to(device)
    loss = fit(model, data, args)
    save_file({name: p.detach().half().cpu() for name, p in model.named_parameters()}, args.out / "model.safetensors")
    report = {"loss": loss, "seconds": time.time() - start, "checks": check(model, tokenizer)}
    (args.out / "training.json").write_text(json.dumps(report, indent=1, ensure_ascii=False))
    print(json.dumps(report, indent=1, ensure_ascii=False))


if __name__ == "__main__":
    main()
