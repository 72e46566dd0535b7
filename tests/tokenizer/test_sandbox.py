# ruff: noqa: E501 (a template stands on one line)
"""Templates that want out, and templates that want everything."""

from __future__ import annotations

import gc
import sys
import threading
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest

from worker_orcd.errors import TemplateError
from worker_orcd.tokenizer.chat import ChatTemplate

ESCAPES = [
    "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "{{ ''['__class__'] }}",
    "{{ ''|attr('__class__') }}",
    "{{ ''|attr('for' ~ 'mat') }}",
    "{{ '{a.__class__}'.format(a=1) }}",
    "{{ '{0[__class__]}'.format(messages) }}",
    "{{ '{:{w}}'.format(1, w=9) }}{{ '{!r}'.format(messages.append) }}",
    "{{ '{0.__class__}'.format(1) }}",
    "{{ '{0.__class__.__init__.__globals__}'.format(self) }}",
    "{{ '%s'|format(1) }}",
    "{{ '{x.__class__}'.format_map({'x': 1}) }}",
    "{{ ''.format.__self__ }}",
    "{{ ['{0.__class__}']|map('format', 1)|list }}",
    "{{ ['{0.__class__}']|map(attribute='format')|first()(1) }}",
    "{% set f = 'x'.format %}{{ f('{0.__class__}') }}",
    "{{ self.__init__.__globals__ }}",
    "{{ self._TemplateReference__context.environment }}",
    "{{ lipsum.__globals__['os'].popen('id').read() }}",
    "{{ cycler.__init__.__globals__.os.system('id') }}",
    "{{ joiner.__init__.__globals__ }}",
    "{{ namespace.__init__.__globals__ }}",
    "{{ range.__self__ }}",
    "{{ raise_exception.__globals__ }}",
    "{{ raise_exception.__self__.source }}",
    "{{ strftime_now.__globals__['re'] }}",
    "{{ config.__class__ }}",
    "{{ request.application.__globals__ }}",
    "{{ messages.append(1) }}",
    "{{ messages.clear() }}",
    "{{ messages[0].update({'role': 'system'}) }}",
    "{{ messages[0].pop('role') }}",
    "{{ messages[0].setdefault('x', 1) }}",
    "{% macro m() %}{% endmacro %}{{ m.__call__.__globals__ }}",
    "{% macro m() %}{% endmacro %}{{ m._func.__code__ }}",
    "{% macro m() %}{{ caller.__class__ }}{% endmacro %}{% call m() %}{% endcall %}",
    "{% for x in [1] %}{{ loop.__class__ }}{% endfor %}",
    "{% for x in [1] %}{{ loop._iterator.gi_frame }}{% endfor %}",
    "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "{{ (messages|map('upper')).gi_code }}",
    "{{ messages|map(attribute='__class__')|map(attribute='__mro__')|list|first|first }}",
    "{{ messages|groupby('__class__') }}",
    "{{ messages|sort(attribute='__class__.__name__') }}",
    "{{ (1).real.__class__ }}",
    "{{ (1).to_bytes(4, 'big') }}",
    "{{ 'x'.encode().decode.__self__ }}",
    "{{ undefined_name.__class__ }}",
    "{{ undefined_name._undefined_exception }}",
    "{{ ().__class__.__base__ }}",
    "{{ {}.__class__.__base__.__subclasses__() }}",
    "{% import 'os' as os %}{{ os.getcwd() }}",
    "{% from 'os' import getcwd %}",
    "{% include '/etc/passwd' %}",
    "{% extends '/etc/passwd' %}",
    "{{ ''|xmlattr }}",
    "{{ ''['for' + 'mat']('{0.__class__}') }}",
    "{{ dict(__class__=1).__class__ }}",
    "{{ environment }}{{ context.environment }}{{ environment.filters.x }}",
    "{{ 'x'.translate({120: 'y' * 9}) }}",
    "{{ 'x'.maketrans('a', 'b') }}",
    "{% set ns = namespace() %}{% set ns.__class__ = 1 %}{{ ns.__class__ }}",
    "{% block b %}{{ self.b.__func__ }}{% endblock %}",
    "{{ messages|selectattr('__class__.__mro__')|list|first|attr('x') }}",
    "{{ [].__reduce_ex__(2) }}",
]  # fmt: skip

BIG = "{% set x = 'a' * 1000000 %}"
NS = "{% set ns = namespace(x=['a'], y=['a'], s='aaaaaaaa', n=3, t=(1,)) %}"
MANY = "{% for i in range(99999) %}"
BOMBS = {
    "nested loops": MANY + "{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "nested loops, filtered": MANY + "{% for j in range(99999) if false %}{% endfor %}{% endfor %}",
    "long range": "{% for i in range(10 ** 9) %}{% endfor %}",
    "recursion": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "exponential recursion": "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for a in [[1]] recursive %}{{ loop([[a]]) }}{% endfor %}",
    "repeated text": "{{ 'a' * 10 ** 10 }}",
    "repeated list": "{{ [1] * 10 ** 10 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "growing number": NS + MANY + "{% set ns.n = ns.n * ns.n %}{% endfor %}",
    "doubling by +": NS + MANY + "{% set ns.s = ns.s + ns.s %}{% endfor %}",
    "doubling by ~": NS + MANY + "{% set ns.s = ns.s ~ ns.s %}{% endfor %}",
    "doubling list": NS + MANY + "{% set ns.x = ns.x + ns.x %}{% endfor %}",
    "shared lists": NS + MANY + "{% set ns.x = [ns.x, ns.x] %}{% endfor %}{{ ns.x }}",
    "shared lists compared": NS + "{% for i in range(60) %}{% set ns.x = [ns.x, ns.x] %}{% set ns.y = [ns.y, ns.y] %}{% endfor %}{{ ns.x == ns.y }}",
    "shared dicts compared": NS + "{% for i in range(60) %}{% set ns.x = dict(a=ns.x, b=ns.x) %}{% set ns.y = dict(a=ns.y, b=ns.y) %}{% endfor %}{{ ns.x == ns.y }}",
    "shared tuples hashed": NS + "{% for i in range(60) %}{% set ns.t = (ns.t, ns.t) %}{% endfor %}{{ {}.get(ns.t) }}",
    "list in list": "{% set b = [[1] * 500] * 99 %}{% set c = [b] * 99 %}{{ c in [[b] * 98] * 1000 }}",
    "padding": "{{ 'a'.center(10 ** 9) }}",
    "width": "{{ '%1000000000d' % 1 }}",
    "width from argument": "{{ '%*d' % (10 ** 9, 1) }}",
    "indent": "{{ 'a\n' | indent(10 ** 9) }}",
    "format": BIG + "{{ ('{0}' * 100000).format(x) }}",
    "format width": "{{ '{:1000000000}'.format(1) }}",
    "join": BIG + "{{ ([x] * 100000) | join }}",
    "join method": BIG + "{{ ''.join([x] * 100000) }}",
    "join separator": BIG + "{{ x.join(['b'] * 100000) }}",
    "replace": BIG + "{{ x.replace('a', x) }}",
    "replace nothing": BIG + "{{ x | replace('', x) }}",
    "printed list": BIG + "{{ [x] * 100000 }}",
    "printed by ~": BIG + "{% set y = ([x] * 100000) ~ '' %}",
    "printed by string": BIG + "{% set y = ([x] * 100000) | string %}",
    "printed by percent": BIG + "{{ '%s' * 1000 % (x, x) }}",
    "json": BIG + "{{ ([x] * 100000) | tojson }}",
    "json indent": "{{ [1] | tojson(indent=10 ** 9) }}",
    "json separators": BIG + "{{ ([1] * 1000) | tojson(separators=(x, ':')) }}",
    "output": BIG + MANY + "{{ x }}{% endfor %}",
    "own text": MANY + "y" * 60_000 + "{% endfor %}",
    "own text, captured": "{% set z %}" + MANY + "y" * 60_000 + "{% endfor %}{% endset %}",
    "own text, by macro": "{% macro m() %}" + "y" * 60_000 + "{% endmacro %}" + MANY + "{% set z = m() %}{% endfor %}",
    "pieces": MANY + "{% set x = ('ab' * 4000000).split('a') %}{% endfor %}",
    "date": "{{ strftime_now('%1000000000Y') }}",
    "long sort": "{% set x = ([1] * 900000) | sort %}",
    "straight sorts": "{% set x = range(9999) | reverse | sort %}" * 1500,
    "straight searches": "{% set l = range(99999) | list %}" + "{% if -1 in l %}{% endif %}" * 2000,
    "straight tests": "{% set l = range(99999) | list %}" + "{% if -1 is in(l) %}{% endif %}" * 1900,
    "straight maps": "{% set x = range(99999)" + " | map('string')" * 100 + " | list %}",
    "straight attributes": "{% set x = range(99999)" + " | map(attribute='real')" * 100 + " | list %}",
    "rounding": "{{ 1.5 | round(10 ** 8, 'ceil') }}",
    "lines": "{% set x = ('\n' * 8000000) | indent %}",
    "title": "{{ ('aB-' * 2000000) | title }}",
    "parentheses": "{{ " + "(" * 20_000 + "1" + ")" * 20_000 + " }}",
    "signs": "{{ " + "-" * 60_000 + "1 }}",
    "digits": "{{ " + "9" * 60_000 + " }}",
    "nested ifs": "{% if 1 %}" * 500 + "{% endif %}" * 500,
}  # fmt: skip

MESSAGES: list[dict[str, Any]] = [{"role": "user", "content": "my secret"}]
FORBIDDEN_EVENTS = ("open", "os.", "subprocess.", "socket.", "import", "exec", "ctypes.", "shutil.")


@pytest.fixture(scope="module")
def events() -> list[str]:
    """Names of the interpreter's audit events, once "on" is in the list. A hook cannot be taken out again."""
    seen: list[str] = []

    def hook(event: str, _: tuple[object, ...]) -> None:
        if seen and event.startswith(FORBIDDEN_EVENTS):
            seen.append(event)

    sys.addaudithook(hook)
    seen.append("on")
    Path(__file__).open().close()
    assert "open" in seen, "the hook works"
    seen.clear()
    return seen


@pytest.mark.parametrize("source", ESCAPES)
def test_nothing_gets_out(source: str, events: list[str]) -> None:
    """The template fails or prints nothing of the interpreter; no file, process, socket or import is touched."""
    template = ChatTemplate(source)  # compiled here, where compile and exec are allowed
    before = [dict(message) for message in MESSAGES]
    events[:] = ["on"]
    try:
        text = template.render(MESSAGES)
    except TemplateError as error:
        text = str(error)
    finally:
        seen = events[1:]
        events.clear()
    assert not seen
    assert not any(mark in text for mark in ("<class", "<module", "<function", "<built-in", "<code", "root:", "0x"))
    assert before == MESSAGES


@pytest.mark.parametrize("name", BOMBS)
def test_nothing_costs_more_than_the_budget(name: str) -> None:
    """Refused within the budget of 0.5 s of this thread, give or take; the bombs would take minutes."""
    template = ChatTemplate(BOMBS[name])
    start = time.thread_time()
    with pytest.raises(TemplateError) as caught:
        template.render(MESSAGES)
    assert time.thread_time() - start < 1.5
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["doubling by +", "doubling list", "pieces", "printed list", "json", "own text, captured"]
)
def test_memory_stays_bounded(name: str) -> None:
    tracemalloc.start()
    try:
        with pytest.raises(TemplateError):
            ChatTemplate(BOMBS[name]).render(MESSAGES)
        assert tracemalloc.get_traced_memory()[1] < 512 * 2**20
    finally:
        tracemalloc.stop()


def test_other_threads_go_on_meanwhile() -> None:
    """How much the worst bombs compute between two turns of another thread; the interpreter hands over every 5 ms.

    Measured in time of this process, so that others on the machine do not count, and compared with two million
    additions, as they slow it down. Compiling is done before, and no garbage is looked for: how long that takes depends
    on what other tests have left.
    """
    names = ("nested loops", "straight sorts", "straight searches", "straight maps", "pieces")
    templates = [ChatTemplate(BOMBS[name]) for name in names]
    gaps: list[float] = []
    stop = threading.Event()

    def watch() -> None:
        last = time.process_time()
        while not stop.is_set():
            time.sleep(0.002)
            now = time.process_time()
            gaps.append(now - last)
            last = now

    thread = threading.Thread(target=watch)
    gc.collect()
    gc.disable()
    thread.start()
    try:
        for template in templates:
            with pytest.raises(TemplateError):
                template.render(MESSAGES)
    finally:
        stop.set()
        thread.join()
        gc.enable()
    start = time.process_time()
    sum(range(2_000_000))
    unit = time.process_time() - start
    gaps.sort()
    assert gaps[len(gaps) * 99 // 100] < 3 * unit


def test_threads_have_budgets_of_their_own() -> None:
    template = ChatTemplate("{% for i in range(n) %}{% for j in range(n) %}{% endfor %}{% endfor %}{{ n }}")
    results: dict[int, str] = {}

    def render(n: int) -> None:
        try:
            results[n] = template.render([], n=n)
        except TemplateError:
            results[n] = "refused"

    threads = [threading.Thread(target=render, args=(n,)) for n in (3, 20_000, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {3: "3", 20_000: "refused", 5: "5"}
