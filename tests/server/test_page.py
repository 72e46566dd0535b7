"""The page at `/`: how it is served, and what a person meets who uses it in a browser."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator

import pytest

from tests.browser import CHROMIUM, Page, browser
from tests.fakes import ScriptedEngine, Step, UserTemplate, forever, text_script
from tests.server.client import Live, eventually, live, make_rig
from worker_orcd.engine.request import Failed, Request
from worker_orcd.server.page import FILES

NOW = '(document.querySelector(".turn:last-child .body")?.textContent ?? "")'
IS_IDLE = '!document.querySelector(".streaming")'
MARKDOWN = "Some **bold** and `x < y`.\n\n```python\nprint('<b>')\n```\n<img src=x onerror=alert(1)> <b>raw</b>"


def script(request: Request) -> list[Step]:
    """What the page asks for decides what it gets."""
    asked = bytes(i for i in request.prompt_ids if i < 256).decode().rpartition("<user>")[2]
    if "forever" in asked:
        return forever()  # type: ignore[return-value]
    if "break" in asked:
        return [*text_script("half an ans")[:-1], Failed("CUDA_ERROR", "the device failed", False)]
    return text_script(MARKDOWN if "markdown" in asked else f"You said: {asked.partition('<')[0]}")


def test_it_is_served_under_a_policy_that_lets_nothing_else_in() -> None:
    rig = make_rig()
    for name, media_type in FILES.items():
        answer = rig.call("GET", f"/{name}")
        assert answer.status == 200
        assert answer.headers["content-type"].startswith(media_type)
        policy = answer.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert answer.headers["x-content-type-options"] == "nosniff"
        again = rig.call("GET", f"/{name}", headers={"if-none-match": answer.headers["etag"]})
        assert (again.status, again.body) == (304, b"")
    page = rig.call("GET", "/").body.decode()
    assert not re.search(r"https?://|//[a-z]", page), "it must work offline"
    assert re.findall(r'(?:src|href)="([^"]*)"', page) == ["data:,", "style.css", "app.js"]


def test_the_script_never_makes_html_of_text() -> None:
    script = make_rig().call("GET", "/app.js").body.decode()
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval\(|new Function", script)


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(ScriptedEngine(script), template=UserTemplate()) as running:
        yield running


@pytest.fixture(scope="module")
def tab(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    if CHROMIUM is None:
        pytest.skip("no Chromium is installed (Debian: apt-get install chromium)")
    with browser(tmp_path_factory.mktemp("chromium")) as page:
        yield page


@pytest.fixture
def page(server: Live, tab: Page) -> Iterator[Page]:
    """A fresh page on a wide light screen; it may have complained of nothing in the end."""
    tab.complaints.clear()
    tab.resize(1280, 860)
    tab.scheme("light")
    tab.open(f"http://127.0.0.1:{server.port}/")
    tab.run("localStorage.clear(), sessionStorage.clear()")
    tab.reload()
    tab.wait("document.getElementById('state').dataset.state === 'ready'")
    yield tab
    assert tab.complaints == []


def ask(page: Page, text: str) -> None:
    page.run("document.getElementById('text').focus()")
    page.type(text)
    page.press("Enter")


def test_an_answer_is_typed_for_sent_and_read(page: Page) -> None:
    ask(page, "markdown, please")
    page.wait(f"{IS_IDLE} && document.querySelector('.note')?.textContent.includes('tokens')")
    body = page.run("document.querySelector('.assistant .body').innerHTML")
    assert "<strong>bold</strong>" in body
    assert "<code>x &lt; y</code>" in body
    assert "<figcaption>python" in body
    assert "print('&lt;b&gt;')" in body
    assert "&lt;img src=x onerror=alert(1)&gt; &lt;b&gt;raw&lt;/b&gt;" in body  # as text
    assert page.run("document.querySelectorAll('.body img, .body b').length") == 0
    assert page.run("document.activeElement.id") == "text"


def test_turns_follow_each_other_and_survive_a_reload(page: Page, server: Live) -> None:
    ask(page, "one")
    page.wait(f"{IS_IDLE} && {NOW} === 'You said: one'")
    page.run("""(() => { for (const [name, value] of [["system", "be brief"], ["temperature", "0.5"], ["seed", "7"],
        ["top_k", "20"], ["min_p", "0.1"], ["max_tokens", "99"]]) document.forms.options.elements[name].value = value;
        document.forms.options.dispatchEvent(new Event("input")); })()""")
    ask(page, "two")
    page.wait(f"{IS_IDLE} && {NOW} === 'You said: two'")
    request = server.rig.engine.requests[-1]
    sent = bytes(request.prompt_ids).decode()
    assert sent == "<system>be brief<user>one<assistant>You said: one<user>two<assistant>"
    sampling = request.sampling
    assert (sampling.temperature, sampling.seed, sampling.top_k, sampling.min_p) == (0.5, 7, 20, 0.1)
    assert request.max_tokens == 99
    page.reload()
    page.wait("document.querySelectorAll('.turn').length === 4")
    assert page.run("document.forms.options.elements.temperature.value") == "0.5"
    page.click("#new")
    assert page.run("document.querySelectorAll('.turn').length") == 0


@pytest.mark.parametrize("how", ["click", "Escape"])
def test_tokens_arrive_one_by_one_until_it_is_stopped(page: Page, server: Live, how: str) -> None:
    ask(page, "forever")
    seen = [page.wait(f"{NOW}.length")]
    seen.append(page.wait(f"{NOW}.length > {seen[0] + 5} && {NOW}.length"))
    assert page.run("document.getElementById('state').isConnected && !document.getElementById('stop').hidden")
    assert page.run("document.querySelector('.streaming').getAttribute('aria-busy')") == "true"
    page.click("#stop") if how == "click" else page.press("Escape")
    page.wait(f"{IS_IDLE} && document.querySelector('.note').textContent.startsWith('stopped')")
    eventually(lambda: not server.rig.engine.running)  # the worker knows, too
    length = page.run(f"{NOW}.length")
    assert length >= seen[1]
    ask(page, "more")
    page.wait(f"{IS_IDLE} && {NOW} === 'You said: more'")


def test_a_refusal_is_shown_in_the_words_of_the_worker(page: Page) -> None:
    page.run("document.forms.options.elements.top_k.value = '99999999999'")
    ask(page, "too long")
    message = page.wait("document.querySelector('.failure[role=alert]')?.textContent")
    assert "top_k" in message
    assert any("400" in complaint for complaint in page.complaints)  # the browser's own note of the status
    page.complaints.clear()
    page.run("document.forms.options.elements.top_k.value = ''")
    page.click(".failure button")
    page.wait(f"{IS_IDLE} && {NOW} === 'You said: too long'")
    assert page.run("document.querySelectorAll('.turn').length") == 2


def test_a_question_that_cannot_be_answered_is_not_to_be_tried_again(page: Page) -> None:
    ask(page, "x" * 4096)
    page.wait("document.querySelector('.failure')?.textContent.includes('4096')")
    assert page.run("document.querySelectorAll('.failure button').length") == 0
    page.complaints.clear()


def test_an_answer_that_breaks_off_keeps_what_came(page: Page) -> None:
    ask(page, "break")
    message = page.wait("document.querySelector('.failure')?.textContent")
    assert "device failed" in message
    assert page.run("document.querySelector('.assistant .body').textContent") == "half an ans"


def test_a_value_out_of_range_is_not_sent(page: Page, server: Live) -> None:
    count = len(server.rig.engine.requests)
    page.run("document.forms.options.elements.temperature.value = '9'")
    ask(page, "hello")
    page.wait("document.activeElement.name === 'temperature' && document.getElementById('settings').open")
    assert len(server.rig.engine.requests) == count
    assert page.run("document.getElementById('text').value") == "hello"


def test_the_live_view_shows_what_metrics_say(page: Page, server: Live) -> None:
    server.rig.engine.memory = {"kv_cache": 10**9, "weights": 3 * 10**9}
    ask(page, "forever")
    page.wait("document.getElementById('running').textContent === '1'")
    page.wait("parseFloat(document.getElementById('speed').textContent) > 5")
    page.wait("document.querySelectorAll('#itl rect:not(.base)').length > 3")
    assert page.run("document.querySelectorAll('#strip i').length") == 64
    assert page.run("document.querySelectorAll('#strip .cached').length") == 8
    assert page.run("document.querySelectorAll('#strip .used').length") == 1
    assert "p50" in page.run("document.getElementById('ttft').getAttribute('aria-label')")
    assert page.run("document.getElementById('memory-list').innerText").split("\n") == [
        "weights", "3.00 GB", "kv cache", "1.00 GB",
    ]  # fmt: skip
    page.press("Escape")
    page.wait(IS_IDLE)


def test_dark_and_light_follow_the_system(page: Page) -> None:
    look = "(() => { const s = getComputedStyle(document.body); return [s.backgroundColor, s.color]; })()"
    brightness = lambda rgb: sum(map(int, re.findall(r"\d+", rgb)[:3]))  # noqa: E731
    ground, ink = map(brightness, page.run(look))
    assert ground > 700 > 200 > ink
    page.scheme("dark")
    ground, ink = map(brightness, page.run(look))
    assert ground < 120 < 600 < ink


def test_on_a_narrow_screen_nothing_is_cut_and_the_panel_is_a_drawer(page: Page) -> None:
    page.resize(360, 640)
    ask(page, "markdown with a_very_long_word_" + "x" * 200)
    page.wait(f"{IS_IDLE} && document.querySelector('.note')?.textContent")
    assert page.run("document.documentElement.scrollWidth") == 360
    assert page.run("document.getElementById('log').scrollWidth <= document.getElementById('log').clientWidth")
    shown = "getComputedStyle(document.getElementById('side')).visibility"
    page.wait(f"{shown} === 'hidden'")
    page.click("#toggle")
    page.wait(f"{shown} === 'visible' && document.activeElement.id === 'close'")
    assert page.run("document.getElementById('toggle').ariaExpanded") == "true"
    page.press("Escape")
    page.wait(f"{shown} === 'hidden' && document.activeElement.id === 'toggle'")


def test_a_failure_on_a_narrow_screen_is_in_line_with_its_button(page: Page) -> None:
    page.resize(390, 844)
    page.run("document.forms.options.elements.top_k.value = '99999999999'")
    ask(page, "hello")
    left = "document.querySelector('.failure {}').getBoundingClientRect().left"
    page.wait(f"document.querySelector('.failure button') && {left.format('button')} === {left.format('span')}")
    page.complaints.clear()


def test_labels_of_a_histogram_stay_apart(tab: Page) -> None:
    with live(ScriptedEngine(script)) as fresh:
        for ms in (150.0, 2000.0):
            fresh.rig.metrics.record_first_token_latency(ms)
        tab.resize(390, 844)
        tab.open(f"http://127.0.0.1:{fresh.port}/")
        tab.wait("document.querySelectorAll('#ttft text').length > 1")
        gaps = """[...document.querySelectorAll("#ttft text")].map((text) => text.getBoundingClientRect()).map(
            (box, i, all) => i ? box.left - all[i - 1].right : 99)"""
        assert min(tab.run(gaps)) > 6


def test_every_control_has_a_name_and_a_place_in_the_tab_order(page: Page) -> None:
    page.run("document.getElementById('settings').open = true")
    nameless = """[...document.querySelectorAll('button, input, textarea, svg, [role]')].filter((node) =>
        !(node.ariaLabel || node.textContent.trim() || node.labels?.length || node.querySelector('[aria-label]')
          || node.getAttribute('role') === 'status')).map((node) => node.outerHTML)"""
    assert page.run(nameless) == []
    page.run("document.body.focus()")
    reached = set()
    for _ in range(20):
        page.press("Tab")
        reached.add(page.run("document.activeElement.id || document.activeElement.name"))
    assert {"text", "new", "system", "temperature", "seed", "key"} <= reached


def test_a_worker_that_is_gone_is_said_to_be(tab: Page) -> None:
    with live(ScriptedEngine(script), template=UserTemplate()) as short:
        tab.open(f"http://127.0.0.1:{short.port}/")
        tab.wait("document.getElementById('state').dataset.state === 'ready'")
    tab.wait("document.getElementById('state-text').textContent === 'cannot be reached'")
    ask(tab, "hello?")
    assert "cannot be reached" in tab.wait("document.querySelector('.failure')?.textContent")


def test_the_key_goes_with_every_request_and_stays_in_the_tab(tab: Page, server: Live) -> None:
    tab.open(f"http://127.0.0.1:{server.port}/")
    tab.run("""(() => { window.sent = []; const real = fetch; window.fetch = (url, options) => {
        sent.push([url.pathname, options?.headers?.["x-api-key"]]); return real(url, options); };
        const key = document.forms.options.elements.key; key.value = "s3cret";
        for (const name of ["input", "change"]) key.dispatchEvent(new Event(name, {bubbles: true})); })()""")
    tab.wait("sent.some(([url, key]) => url === '/metrics' && key === 's3cret')")
    assert "s3cret" in tab.run("sessionStorage.getItem('key')")
    assert "s3cret" not in json.dumps(tab.run("({...localStorage})"))
