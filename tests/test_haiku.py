"""The embedded model in our own engine: it answers with haiku, and the worker shows it from outside."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from worker_orcd.assemble import Blueprint, Texts, build_core, draw_up, embedded_model, load_runtime, load_texts
from worker_orcd.config import WorkerConfig
from worker_orcd.engine.engine import BatchEngine
from worker_orcd.engine.metrics import NoOpMetrics
from worker_orcd.engine.request import Finished, Request, SamplingParams, Tokens

EXAMPLE = Path(__file__).parents[1] / "examples" / "haiku"
THEMES = ["GPU computing", "the sea", "autumn rain", "coffee", "my cat", "a train at night", "zygotes", "love"]


class Haiku:
    """Engine and tokenizer of the embedded model."""

    def __init__(self) -> None:
        config = WorkerConfig(device="cpu", context_length=256)
        self.blueprint: Blueprint = draw_up(config)
        self.texts: Texts = load_texts(config, self.blueprint)
        runtime = load_runtime(config, self.blueprint, lambda *_: None)
        tokenizer = self.texts.tokenizer
        core, facts = build_core(config, self.blueprint, runtime, tokenizer.eog_ids, list(tokenizer.unsampleable))
        self.engine = BatchEngine(core, facts, 64, NoOpMetrics())

    def ask(self, asked: list[tuple[str, int]], *, chat: bool = False, temperature: float = 0.7) -> list[list[int]]:
        """Ids of the answers to all (prompt, seed), asked at once; each must have ended by itself."""

        async def all_of_them() -> list[list[int]]:
            return await asyncio.gather(*(self._answer(prompt, seed, temperature) for prompt, seed in asked))

        if chat:
            template = self.texts.chat_template
            assert template is not None
            asked = [(template.render([{"role": "user", "content": prompt}]), seed) for prompt, seed in asked]
        return asyncio.run(all_of_them())

    async def _answer(self, prompt: str, seed: int, temperature: float) -> list[int]:
        ids = self.texts.tokenizer.encode(prompt)
        request = Request(f"{prompt} {seed}", ids, 60, SamplingParams(seed, temperature))
        events = [event async for event in self.engine.run(request)]
        assert isinstance(events[-1], Finished)
        assert events[-1].reason == "eos"
        return [token for event in events if isinstance(event, Tokens) for token in event.ids]

    def text(self, ids: list[int]) -> str:
        return self.texts.tokenizer.decode(ids).strip()


@pytest.fixture(scope="module")
def haiku() -> Iterator[Haiku]:
    model = Haiku()
    yield model
    model.engine.close()


@pytest.fixture(scope="module")
def is_haiku():  # type: ignore[no-untyped-def]
    """The syllable scanner of the example, which knows every word the model was taught."""
    sys.path.insert(0, str(EXAMPLE))
    from lexicon import is_haiku

    yield is_haiku
    sys.path.remove(str(EXAMPLE))


def test_it_is_small(haiku: Haiku) -> None:
    assert embedded_model().stat().st_size <= 6_000_000
    assert haiku.blueprint.gguf.quant_kind == "Q4_K_M"


@pytest.mark.parametrize("chat", [False, True])
def test_answers_scan_and_differ(haiku: Haiku, is_haiku, chat: bool) -> None:  # type: ignore[no-untyped-def]
    asked = [(f"Write a haiku about {theme}", seed) for theme in THEMES for seed in range(3)]
    answers = [haiku.text(ids) for ids in haiku.ask(asked, chat=chat)]
    assert sum(map(is_haiku, answers)) >= 0.9 * len(answers), answers
    assert len(set(answers)) >= 0.9 * len(answers)


@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_the_same_seed_gives_the_same_ids(haiku: Haiku, temperature: float) -> None:
    asked = [(f"Write a haiku about {theme}", 42) for theme in THEMES[:4]]
    alone = [haiku.ask([one], temperature=temperature)[0] for one in asked]
    assert haiku.ask(asked, temperature=temperature) == alone
    assert haiku.ask(asked[::-1], temperature=temperature) == alone[::-1]


@pytest.mark.parametrize("command", ["haiku", "chat"])
def test_a_worker_that_cannot_start_says_so_in_one_line(command: str) -> None:
    env = os.environ | {"CUDA_VISIBLE_DEVICES": ""}
    line = [sys.executable, "-m", "worker_orcd", command]
    done = subprocess.run(line, input="hi\n", capture_output=True, text=True, timeout=90, env=env)
    assert done.returncode == 1
    [told] = done.stderr.splitlines()
    assert told.startswith("WORKER_START_FAILED: no usable NVIDIA GPU")


def test_a_request_that_is_refused_is_explained() -> None:
    command = [sys.executable, "-m", "worker_orcd", "haiku", "--device", "cpu", "--prompt", ""]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 1
    assert "prompt has 0 characters" in done.stderr.splitlines()[-1]


def test_the_command_shows_it_and_stops_the_worker() -> None:
    command = [sys.executable, "-m", "worker_orcd", "haiku", "--device", "cpu", "--json"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert "--device cpu" in done.stdout.splitlines()[0]
    result = json.loads(done.stdout.splitlines()[-1])
    assert set(result) == {"text", "token_ids", "repeat_identical", "tokens_per_second", "first_token_ms"}
    assert result["repeat_identical"] is True
    assert len(result["text"].strip().splitlines()) == 3
    assert result["text"].strip() in done.stdout
    assert len(result["token_ids"]) > 8
    assert result["tokens_per_second"] > 0
    assert result["first_token_ms"] > 0
