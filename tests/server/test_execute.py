"""`/execute` in memory: fields, limits, events and their order."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.fakes import ByteTokenizer, ScriptedEngine, Step, UserTemplate, forever, text_script
from tests.server.client import Answer, Rig, make_rig
from worker_orcd.engine.request import Failed
from worker_orcd.errors import Cancelled, JobConflict, Overloaded, ShuttingDown, TemplateError
from worker_orcd.server.control import Job
from worker_orcd.server.schemas import UNSUPPORTED
from worker_orcd.tokenizer.stream import TextStream

HUGE = 10**400
LIMITS: dict[str, tuple[list[object], list[object]]] = {  # field: legal edges, illegal values
    "job_id": (["a", "é" * 256], ["", "a" * 257, "a\nb", "a\x00", 1, True, [], {}, 1.5]),
    "prompt": (["a", "a\x00b", "日本"], ["", "a" * 32769, 1, True, ["a"], {"a": 1}]),
    "max_tokens": ([1, 2048], [-1, 0, 2049, 2**31, 2**63, HUGE, 1.0, 1.5, True, "1", [1], {}]),
    "temperature": ([0, 2, 0.5, 1e-30], [-1, 2.1, -1e-9, 2**63, HUGE, True, "1", [1], {}]),
    "top_p": ([0, 1, 0.5], [-0.1, 1.1, 2**31, HUGE, False, "1", [1], {}]),
    "top_k": ([0, 256, 257], [-1, 258, 2**31, 2**63, HUGE, 1.0, True, "1", [1], {}]),
    "repetition_penalty": ([0, 2, 1.1], [-1, 2.5, 2**63, HUGE, True, "1", [1], {}]),
    "min_p": ([0, 1, 0.05], [-1, 1.5, HUGE, True, "1", [1], {}]),
    "stop": ([[], ["a"] * 4, ["a" * 32]], ["a", [""], ["a"] * 5, ["a" * 4097], [1], [None], 1, True, {}]),
    "seed": ([0, 2**64 - 1, 2**63], [-1, 2**64, HUGE, 1.0, 0.5, True, "1", [1], {}]),
    "apply_chat_template": ([False], [0, 1, "true", [], {}]),
    "priority": (["interactive", "batch"], ["", "high", "Batch", 0, 1, True, [], ["batch"], {}]),
    "metrics": ([False, True], [0, 1, "true", [], {}]),
}
GOOD = [(name, value) for name, (good, _) in LIMITS.items() for value in good]
BAD = [(name, value) for name, (_, bad) in LIMITS.items() for value in bad]


@pytest.fixture(scope="module")
def rig() -> Rig:
    return make_rig()


@pytest.mark.parametrize(("name", "value"), GOOD, ids=lambda value: repr(value)[:20])
def test_every_legal_edge_is_served(rig: Rig, name: str, value: object) -> None:
    answer = rig.execute(**{name: value})
    assert answer.status == 200
    assert answer.events[-1].name == "end"


@pytest.mark.parametrize(("name", "value"), BAD, ids=lambda value: repr(value)[:20])
def test_every_illegal_value_is_refused_by_name(rig: Rig, name: str, value: object) -> None:
    answer = rig.execute(**{name: value})
    assert answer.status == 400
    assert answer.error["code"] == "INVALID_REQUEST"
    assert list(answer.bad_fields) == [name]


@pytest.mark.parametrize("name", sorted(set(LIMITS) - {"job_id", "prompt"}))
def test_null_means_the_default(rig: Rig, name: str) -> None:
    assert rig.execute(**{name: None}).status == 200
    given, default = rig.engine.requests[-1], make_rig()
    default.execute(seed=given.sampling.seed)
    assert given == default.engine.requests[-1]


@pytest.mark.parametrize("name", ["job_id", "prompt"])
def test_required_fields(rig: Rig, name: str) -> None:
    assert rig.execute(**{name: None}).bad_fields == {name: "required"}


def test_every_bad_field_is_reported_at_once(rig: Rig) -> None:
    bad = {name: values[0] for name, (_, values) in LIMITS.items()}
    answer = rig.execute(**bad, logit_bias={"5": 100}, n=2, stream=False)
    assert set(answer.bad_fields) == set(LIMITS) | {"logit_bias", "n", "stream"}


def test_errors_show_numbers_but_no_text(rig: Rig) -> None:
    answer = rig.execute(prompt=["CANARY"], stop=["CANARY" * 9], seed="CANARY", max_tokens=9999, top_k=HUGE)
    errors = {item["field"]: item for item in answer.error["details"]["errors"]}
    assert b"CANARY" not in answer.body
    assert errors["max_tokens"]["value"] == 9999
    assert errors["top_k"]["value"] == "integer"
    assert errors["seed"]["value"] == "string"
    assert errors["stop[0]"]["value"] == 54
    assert all(set(item) == {"field", "constraint", "message", "value"} for item in errors.values())


@pytest.mark.parametrize("name", sorted(UNSUPPORTED))
def test_unsupported_fields_are_refused_unless_they_ask_for_nothing(rig: Rig, name: str) -> None:
    for value in (*UNSUPPORTED[name], None):
        assert rig.execute(**{name: value}).status == 200
    assert rig.execute(**{name: 7}).bad_fields == {name: "unsupported"}


def test_true_is_not_one(rig: Rig) -> None:
    assert rig.execute(n=True).bad_fields == {"n": "unsupported"}


def test_unknown_fields_are_ignored(rig: Rig) -> None:
    assert rig.execute(some_new_thing={"a": [1]}).status == 200


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        b"[]",
        b"null",
        b'"x"',
        b"\xff",
        b'{"a": NaN}',
        b'{"a": Infinity}',
        b'{"a": -Infinity}',
        b'{"job_id": "a", "prompt": "\\ud800"}',
        b'{"job_id": "a", "prompt": "x", "stop": ["\\udfff"]}',
        b'{"job_id": "a", "prompt": "x", "\\ud800": 1}',
        b'{"job_id": "a", "prompt": "\xed\xa0\x80"}',
        b'{"job_id": "a", "job_id": "b", "prompt": "x"}',
        b'{"job_id": "a", "prompt": "x", "seed": ' + b"9" * 5000 + b"}",
        b'{"a": ' + b"[" * 64 + b"]" * 64 + b"}",
        b'{"a": ' + b"[" * 150_000 + b"]" * 150_000 + b"}",
        b'{"a": 1} trailing',
        b"\xef\xbb\xbf{}",
        b'{"job_id": "a", "prompt": "x", "temperature": 1e999}',
    ],
    ids=range(20),
)
def test_malformed_bodies_are_the_clients_fault(rig: Rig, body: bytes) -> None:
    answer = rig.call("POST", "/execute", body)
    assert answer.status == 400
    assert answer.error["code"] == "INVALID_REQUEST"


def test_depth_64_is_allowed(rig: Rig) -> None:
    deep = '{"job_id": "a", "prompt": "x", "new": ' + "[" * 63 + "]" * 63 + "}"
    assert rig.call("POST", "/execute", deep.encode()).status == 200


def test_a_number_without_a_fraction_reaches_the_engine_as_a_float(rig: Rig) -> None:
    rig.execute(temperature=1, top_p=0)
    sampling = rig.engine.requests[-1].sampling
    assert (type(sampling.temperature), type(sampling.top_p)) == (float, float)


def test_the_seed_is_drawn_when_left_out_and_told(rig: Rig) -> None:
    first, second = rig.execute(), rig.execute()
    seeds = [answer.events[0].data["seed"] for answer in (first, second)]
    assert seeds[0] != seeds[1]
    assert first.events[-1].data["seed"] == seeds[0]
    assert rig.execute(seed=2**64 - 1).events[-1].data["seed"] == 2**64 - 1


def test_both_paths_and_the_events_of_an_answer(rig: Rig) -> None:
    answer = rig.call("POST", "/v2/execute", {"job_id": "j1", "prompt": "héllo", "seed": 7})
    started, *tokens, end = answer.events
    assert answer.headers["content-type"].startswith("text/event-stream")
    assert answer.headers["cache-control"] == "no-store"
    assert answer.headers["x-accel-buffering"] == "no"
    assert set(started.data) == {"job_id", "model", "started_at", "seed", "prompt_tokens", "cached_tokens"}
    assert started.data["started_at"].endswith("Z")
    assert started.data["prompt_tokens"] == 6
    assert answer.text == "héllo"
    assert [token.data["t"] for token in tokens] == ["h", "", "é", "l", "l", "o"]
    assert set(end.data) == {"tokens_out", "decode_time_ms", "stop_reason", "seed", "cached_tokens", "receipt"}
    assert end.data["stop_reason"] == "eos"


@pytest.mark.parametrize(("length", "status"), [(99, 200), (100, 400)])
def test_a_prompt_over_the_context_is_refused_with_counts(length: int, status: int) -> None:
    answer = make_rig(ScriptedEngine(context_length=100)).execute(prompt="a" * length)
    assert answer.status == status
    if status == 400:
        assert answer.error["details"]["errors"] == [
            {
                "field": "prompt",
                "constraint": "length",
                "message": "prompt has 100 tokens; the limit is 99. Shorten it or raise the limit",
                "value": 100,
            }
        ]


def test_max_tokens_in_bounds_the_prompt() -> None:
    small = make_rig(max_tokens_in=10)
    assert small.execute(prompt="a" * 10).status == 200
    assert small.execute(prompt="a" * 11).bad_fields == {"prompt": "length"}


def test_max_tokens_out_is_the_limit_and_the_default() -> None:
    small = make_rig(max_tokens_out=3)
    assert small.execute(max_tokens=4).bad_fields == {"max_tokens": "range"}
    assert small.execute().events[-1].data["tokens_out"] == 3


def test_the_chat_template_wraps_the_prompt() -> None:
    assert make_rig(template=UserTemplate()).execute(apply_chat_template=True).text == "<user>hello<assistant>"
    assert make_rig(template=UserTemplate()).execute().text == "hello"
    assert make_rig().execute(apply_chat_template=True).bad_fields == {"apply_chat_template": "unsupported"}


def test_a_failing_template_is_named() -> None:
    class Broken:
        source = ""

        def render(self, messages: object, add_generation_prompt: bool = True) -> str:  # noqa: ARG002
            raise TemplateError("line 3 is wrong")

    answer = make_rig(template=Broken()).execute(apply_chat_template=True)
    assert (answer.status, answer.error["code"]) == (400, "TEMPLATE_ERROR")


@pytest.mark.parametrize("reason", ["eos", "max_tokens", "context_length"])
def test_stop_reasons_of_the_engine(reason: str) -> None:
    answer = make_rig(ScriptedEngine(lambda _: [65, reason])).execute()
    assert answer.events[-1].data["stop_reason"] == reason


def test_a_stop_string_ends_the_answer_and_frees_the_engine() -> None:
    rig = make_rig(ScriptedEngine(lambda _: text_script("one two three four")))
    answer = rig.execute(stop=["zzz", "three"])
    assert answer.text == "one two "
    assert answer.events[-1].data["stop_reason"] == "stop_sequence"
    assert answer.events[-1].data["stop_sequence_matched"] == "three"
    assert answer.events[-1].data["tokens_out"] == len("one two three")
    assert rig.engine.cancelled == ["job"]


def test_the_engine_is_told_even_if_its_iterator_lives_on() -> None:
    class Keeping(ScriptedEngine):
        def run(self, request):  # type: ignore[no-untyped-def, override]
            self.kept = super().run(request)
            return self.kept

    rig = make_rig(Keeping(lambda _: text_script("one two")))

    async def story() -> list[str]:  # looks before the loop closes what was left open
        await rig.acall("POST", "/execute", {"job_id": "job", "prompt": "x", "stop": ["one"]})
        return list(rig.engine.cancelled)

    assert asyncio.run(story()) == ["job"]


def test_tokens_that_come_together_leave_in_one_write() -> None:
    rig = make_rig(ScriptedEngine(lambda _: [list(b"abc"), ord("d"), list(b"efgh"), "eos"]))
    answer = rig.execute()
    assert answer.text == "abcdefgh"
    assert [write.count(b"event: token") for write in answer.writes] == [0, 3, 1, 4, 0]


def test_what_piled_up_for_a_reader_leaves_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker_orcd.server.generation.MAX_TOKENS_PER_WRITE", 10)
    answer = make_rig(ScriptedEngine(lambda _: [list(b"x" * 25), "eos"])).execute()
    assert answer.text == "x" * 25
    assert [write.count(b"event: token") for write in answer.writes] == [0, 10, 10, 5, 0]


def test_tokens_after_a_stop_string_are_neither_sent_nor_counted() -> None:
    rig = make_rig(ScriptedEngine(lambda _: [list(b"one two thr"), list(b"ee four"), list(b"five"), "eos"]))
    answer = rig.execute(stop=["three"])
    assert answer.text == "one two "
    assert answer.events[-1].data["tokens_out"] == len("one two three")
    assert rig.scrape()['worker_tokens_generated_total{quant_kind="Q4_K_M",worker_id="worker-test"}'] == 13
    assert rig.engine.cancelled == ["job"]


def test_cached_tokens_are_told_at_both_ends() -> None:
    answer = make_rig(ScriptedEngine(cached_tokens=3)).execute()
    assert answer.events[0].data["cached_tokens"] == answer.events[-1].data["cached_tokens"] == 3


@pytest.mark.parametrize(("word", "priority"), [(None, 0), ("interactive", 0), ("batch", 1)])
def test_the_priority_reaches_the_engine(rig: Rig, word: str | None, priority: int) -> None:
    assert rig.execute(priority=word, tenant="somebody").status == 200
    request = rig.engine.requests[-1]
    assert (request.priority, request.tenant) == (priority, "")


def test_metrics_events_come_only_when_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker_orcd.server.execute.METRICS_S", 0.02)
    rig = make_rig(ScriptedEngine(lambda _: text_script("answer", 0.05), max_running=1))

    async def both() -> list[Answer]:
        first = asyncio.create_task(rig.acall("POST", "/execute", {"job_id": "a", "prompt": "x", "metrics": True}))
        await until(lambda: rig.engine.running)
        second = rig.acall("POST", "/execute", {"job_id": "b", "prompt": "x", "metrics": True})
        third = rig.acall("POST", "/execute", {"job_id": "c", "prompt": "x"})
        return await asyncio.gather(first, second, third)

    *asking, silent = asyncio.run(both())
    assert not any(event.name == "metrics" for event in silent.events)
    for answer, job_id in zip(asking, "ab", strict=True):
        told = [event.data for event in answer.events if event.name == "metrics"]  # between started and the end
        assert len(told) > 2
        assert answer.text == "answer"
        assert all(data["job_id"] == job_id for data in told)
        assert all((data["vram_bytes"], data["num_running"]) == (1 << 20, 1) for data in told)
        assert [data["tokens_out"] for data in told] == sorted(data["tokens_out"] for data in told)
        rate = told[-1]["tokens_out"] * 1000 / told[-1]["decode_time_ms"]
        assert told[-1]["tokens_per_second"] == pytest.approx(rate, abs=0.01)
        assert set(told[0]) == {
            *("job_id", "tokens_out", "decode_time_ms", "tokens_per_second"),
            *("vram_bytes", "num_running", "num_waiting"),
        }


def test_metrics_events_are_at_least_a_quarter_second_apart() -> None:
    answer = make_rig(ScriptedEngine(lambda _: text_script("x" * 17, 0.1))).execute(metrics=True)
    times = [0.0, *(event.data["decode_time_ms"] for event in answer.events if event.name == "metrics")]
    assert len(times) > 2
    assert all(after - before >= 250 for before, after in pairwise(times))


def test_no_metrics_event_after_a_cancel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker_orcd.server.execute.METRICS_S", 0.002)

    class SlowToEnd(ScriptedEngine):
        async def run(self, request):  # type: ignore[no-untyped-def, override]
            try:
                async for event in super().run(request):
                    yield event
            finally:
                await asyncio.sleep(0.1)

    rig, answer = make_rig(SlowToEnd(lambda _: forever())), Answer()

    async def story() -> bytes:
        body = {"job_id": "run", "prompt": "x", "metrics": True}
        run = asyncio.create_task(rig.acall("POST", "/execute", body, answer=answer))
        await until(lambda: answer.body.count(b"event: metrics") > 3)
        await rig.acall("POST", "/cancel", {"job_id": "run"})
        await asyncio.sleep(0.01)  # what was on its way
        sent = len(answer.body)
        await run
        return answer.body[sent:]

    rest = asyncio.run(story())
    assert b"CANCELLED" in rest
    assert b"event: metrics" not in rest


def test_text_held_back_at_the_end_comes_with_the_end() -> None:
    rig = make_rig(ScriptedEngine(lambda _: [*b"ab", 0xE2, 0x82, "max_tokens"]))
    assert rig.execute().events[-1].data["t"] == "\ufffd"
    rig = make_rig(ScriptedEngine(lambda _: text_script("abSTO")))
    answer = rig.execute(stop=["STOP"])
    assert answer.events[-1].data["t"] == "STO"
    assert answer.text == "abSTO"


def test_a_failure_in_band() -> None:
    answer = make_rig(ScriptedEngine(lambda _: [65, Failed("NUMERIC_FAULT", "NaN in logits", False)])).execute()
    assert answer.events[-1].name == "error"
    assert answer.events[-1].data == {"code": "NUMERIC_FAULT", "message": "NaN in logits", "retriable": False}


@pytest.mark.parametrize("script", [[65, RuntimeError("secret path")], [65, TimeoutError()], [65], []])
def test_an_engine_that_breaks_its_promise_is_internal(script: list[Step]) -> None:
    rig = make_rig(ScriptedEngine(lambda _: script))
    answer = rig.execute()
    assert answer.events[-1].data["code"] == "INTERNAL"
    assert b"secret" not in answer.body
    assert rig.log.events("execute_end")[0]["outcome"] == "error"


@pytest.mark.parametrize("is_lazy", [True, False])
@pytest.mark.parametrize(
    ("refusal", "status"), [(Overloaded("full", 7), 429), (ShuttingDown("closing"), 503), (JobConflict("twice"), 409)]
)
def test_refusals_of_the_engine_are_statuses(refusal: Exception, status: int, is_lazy: bool) -> None:
    class Refusing(ScriptedEngine):
        async def _run(self, _request: object):
            raise refusal
            yield

        def run(self, request):  # type: ignore[no-untyped-def, override]
            if not is_lazy:
                raise refusal
            return self._run(request)

    answer = make_rig(Refusing()).execute()
    assert answer.status == status
    assert answer.headers.get("retry-after") == {429: "7", 503: "1", 409: None}[status]
    assert answer.headers["content-type"] == "application/json"


@pytest.mark.parametrize("is_draining", [False, True])
def test_refusals_do_not_wait_to_be_accepted(monkeypatch: pytest.MonkeyPatch, is_draining: bool) -> None:
    monkeypatch.setattr("worker_orcd.server.generation.ACCEPT_S", 1000.0)
    rig = make_rig(ScriptedEngine(max_running=0, max_queue=0))
    if is_draining:
        rig.call("POST", "/shutdown")
        assert rig.call("POST", "/execute", b"not read any more").status == 503
    answer = rig.execute()
    assert answer.status == (503 if is_draining else 429)
    assert answer.headers["retry-after"] == ("1" if is_draining else "2")
    code = "SHUTTING_DOWN" if is_draining else "OVERLOADED"
    samples = rig.scrape()
    assert samples[f'worker_refusals_total{{code="{code}"}}'] == 1 + is_draining
    assert sum(value for name, value in samples.items() if name.startswith("worker_requests_total")) == 0


def test_a_running_job_id_is_refused_and_free_again_afterwards() -> None:
    rig = make_rig(ScriptedEngine(lambda _: text_script("abc", 0.02)))

    async def twice() -> list[Answer]:
        body = {"job_id": "same", "prompt": "x"}
        return await asyncio.gather(*(rig.acall("POST", "/execute", body) for _ in range(2)))

    assert sorted(answer.status for answer in asyncio.run(twice())) == [200, 409]
    assert rig.execute(job_id="same").status == 200


def test_a_full_queue_is_refused_and_the_rest_is_served() -> None:
    rig = make_rig(ScriptedEngine(lambda _: text_script("abc", 0.01), max_running=1, max_queue=2))

    async def flood() -> list[Answer]:
        bodies = [{"job_id": f"j{i}", "prompt": "x"} for i in range(10)]
        return await asyncio.gather(*(rig.acall("POST", "/execute", body) for body in bodies))

    answers = asyncio.run(flood())
    served = [answer for answer in answers if answer.status == 200]
    refused = [answer for answer in answers if answer.status == 429]
    assert (len(served), len(refused)) == (3, 7)
    assert all(answer.events[-1].name == "end" for answer in served)
    assert all(answer.headers["retry-after"] == "2" for answer in refused)


def test_a_waiting_request_is_kept_alive_and_starts_later(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("worker_orcd.server.generation.KEEP_ALIVE_S", 0.05)
    rig = make_rig(ScriptedEngine(lambda _: [0.3, *text_script("a")], max_running=1))

    async def two() -> list[Answer]:
        bodies = [{"job_id": f"j{i}", "prompt": "x"} for i in range(2)]
        return await asyncio.gather(*(rig.acall("POST", "/execute", body) for body in bodies))

    answers = asyncio.run(two())
    assert all(answer.events[-1].name == "end" for answer in answers)
    waited = [answer for answer in answers if answer.body.startswith(b": keep-alive\n\n")]
    assert len(waited) == 1
    assert waited[0].body.count(b": keep-alive\n\n") >= 4


async def until(condition: Callable[[], object]) -> None:
    while not condition():
        await asyncio.sleep(0.001)


def test_cancel_in_every_state() -> None:
    rig = make_rig(ScriptedEngine(lambda _: forever(), max_running=1))

    async def story() -> tuple[Answer, Answer, list[int]]:
        run = asyncio.create_task(rig.acall("POST", "/execute", {"job_id": "run", "prompt": "x"}))
        await until(lambda: rig.engine.num_tokens > 3)
        wait = asyncio.create_task(rig.acall("POST", "/execute", {"job_id": "wait", "prompt": "x"}))
        await until(lambda: rig.engine.waiting)
        await asyncio.sleep(0.2)  # its stream opens
        statuses = []
        for job_id in ("wait", "wait", "run", "run", "unknown"):
            statuses.append((await rig.acall("POST", "/cancel", {"job_id": job_id})).status)
        answers = await run, await wait
        statuses.append((await rig.acall("POST", "/cancel", {"job_id": "run"})).status)
        return *answers, statuses

    run, wait, statuses = asyncio.run(story())
    assert statuses == [202] * 6
    assert [event.name for event in wait.events] == ["started", "error"]
    assert len(run.events) > 3
    assert run.events[-1].data["code"] == wait.events[-1].data["code"] == "CANCELLED"
    assert rig.engine.cancelled == ["wait", "run"]
    assert not rig.engine.running
    assert not rig.engine.waiting


def test_cancel_before_the_stream_is_open_is_a_stream_too() -> None:
    rig = make_rig(ScriptedEngine(lambda _: forever(), max_running=0))

    async def story() -> Answer:
        run = asyncio.create_task(rig.acall("POST", "/execute", {"job_id": "run", "prompt": "x"}))
        await until(lambda: rig.engine.waiting)
        await rig.acall("POST", "/cancel", {"job_id": "run"})
        return await run

    answer = asyncio.run(story())
    assert answer.status == 200
    assert [event.name for event in answer.events] == ["started", "error"]
    assert answer.events[-1].data["code"] == "CANCELLED"


def test_a_job_that_waits_for_its_reader_can_be_cancelled_and_drained() -> None:
    """Its outcome is settled, so neither may touch it any more."""

    async def story() -> None:
        job = Job(None)
        async with job.scope:
            pass
        job.is_settled = True
        job.interrupt(Cancelled("too late"))
        assert job.error is None

    asyncio.run(story())


steps = st.one_of(
    st.sampled_from([*"aSTOP é€😀".encode(), 0xFF, 0xC3, 0x80, 256]),
    st.lists(st.sampled_from([*"aSTOP é€😀".encode(), 0xFF, 256]), min_size=1, max_size=6),
    st.sampled_from([0.0, Failed("CUDA_ERROR", "device lost", False), RuntimeError("bug"), *("eos", "max_tokens")]),
)
stops = st.lists(st.sampled_from(["STOP", "TO", "é", "€ ", "aa", "P"]), max_size=3, unique=True)


@settings(max_examples=150)
@given(script=st.lists(steps, max_size=30), stop=stops, max_tokens=st.integers(1, 30))
def test_any_script_gives_one_ordered_stream_that_loses_no_text(
    script: list[Step], stop: list[str], max_tokens: int
) -> None:
    rig = make_rig(ScriptedEngine(lambda _: script))
    answer = rig.execute(stop=stop, max_tokens=max_tokens)
    *_, last = answer.events  # checks the order
    several = (step if isinstance(step, list) else [step] for step in script if isinstance(step, int | list))
    ids = [token_id for ids in several for token_id in ids][: len(answer.events) - 2]
    stream = TextStream(ByteTokenizer(), stop)
    expected = "".join(map(stream.push, ids))
    if last.name == "end":
        expected += stream.finish()
        assert (last.data["stop_reason"] == "stop_sequence") == (stream.matched is not None)
        assert last.data.get("stop_sequence_matched") == stream.matched
        assert not any(text in answer.text for text in stop)
    assert answer.text == expected
    assert rig.engine.freed == ["job"]
    assert json.loads(rig.log.text.splitlines()[-1])["event"] == "execute_end"
