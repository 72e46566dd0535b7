// Chat over /v1/chat/completions, and a live view over /metrics. Text of the model only ever becomes text nodes.
const $ = (id) => document.getElementById(id);
const make = (tag, className = "", text = "") => {
  const node = document.createElement(tag);
  if (className) node.className = className;
  if (text) node.textContent = text;
  return node;
};
const log = $("log"), text = $("text"), options = $("options"), fields = options.elements;
const NUMBERS = ["temperature", "top_p", "top_k", "min_p", "max_tokens", "seed"];

// ---------------------------------------------------------------- what is kept: the chat and key with the tab
const stored = (store, name, otherwise) => {
  try { return JSON.parse(store.getItem(name)) ?? otherwise; } catch { return otherwise; }
};
const keep = (store, name, value) => { try { store.setItem(name, JSON.stringify(value)); } catch { /* full or forbidden */ } };
let messages = stored(sessionStorage, "chat", []);
const settings = stored(localStorage, "settings", {});
for (const name of ["system", ...NUMBERS]) fields[name].value = settings[name] ?? "";
fields.key.value = stored(sessionStorage, "key", "");
options.addEventListener("input", () => {
  keep(localStorage, "settings", Object.fromEntries(["system", ...NUMBERS].map((name) => [name, fields[name].value])));
  keep(sessionStorage, "key", fields.key.value);
});
options.addEventListener("submit", (event) => event.preventDefault());
fields.key.addEventListener("change", () => poll());
// not relative: fetch refuses those where the address of the page holds a password
const at = (path) => new URL(path, location.origin + location.pathname);
const headers = () => (fields.key.value ? { "x-api-key": fields.key.value } : {});

// ---------------------------------------------------------------- a little markdown: fences, `code`, **strong**, *em*
const INLINE = /(`+)([^`](?:.*?[^`])?)\1(?!`)|\*\*(?=\S)(.+?\S|\S)\*\*|(?<![*\w])\*(?=[^\s*])(.*?[^\s*])\*(?![*\w])/g;

function inline(parent, source) {
  let at = 0;
  for (const match of source.matchAll(INLINE)) {
    parent.append(source.slice(at, match.index));
    const [whole, ticks, code, strong, em] = match;
    if (ticks) parent.append(make("code", "", code));
    else inline(parent.appendChild(make(strong ? "strong" : "em")), strong ?? em);
    at = match.index + whole.length;
  }
  parent.append(source.slice(at));
}

function blocks(source) {
  const found = [];
  let fence = null, lines = [];
  const close = () => {
    const body = lines.join("\n");
    if (fence || body.trim()) found.push({ fence, body: fence ? body : body.replace(/^\n+|\s+$/g, "") });
    lines = [];
  };
  for (const line of source.split("\n")) {
    const mark = line.match(/^ {0,3}(`{3,}|~{3,})\s*([^`]*)$/);
    if (mark && !fence) { close(); fence = { mark: mark[1], name: mark[2].trim() }; }
    else if (fence && mark && mark[1].startsWith(fence.mark) && !mark[2]) { close(); fence = null; }
    else if (!fence && !line.trim() && lines.length) { close(); }
    else lines.push(line);
  }
  close();
  return found;
}

function draw(block) {
  if (!block.fence) {
    const node = make("div", "prose");
    inline(node, block.body);
    return node;
  }
  const figure = make("figure"), caption = make("figcaption", "", block.fence.name || "code"), pre = make("pre");
  caption.append(copyButton(() => block.body, "Copy this code"));
  pre.tabIndex = 0;
  pre.append(make("code", "", block.body));
  figure.append(caption, pre);
  return figure;
}

/** Bring `body` up to `source`: of a growing text only the last blocks are drawn again. */
function render(body, source) {
  const wanted = blocks(source);
  wanted.forEach((block, i) => {
    const key = JSON.stringify(block), node = body.children[i];
    if (node?.source === key) return;
    const fresh = draw(block);
    fresh.source = key;
    node ? node.replaceWith(fresh) : body.append(fresh);
  });
  while (body.children.length > wanted.length) body.lastChild.remove();
}

function copyButton(read, label) {
  const button = make("button", "tool", "Copy");
  button.type = "button";
  button.setAttribute("aria-label", label);
  button.addEventListener("click", async () => {
    try { await navigator.clipboard.writeText(read()); button.textContent = "Copied"; } catch { button.textContent = "Not allowed"; }
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  });
  return button;
}

// ---------------------------------------------------------------- turns
function show(role, content) {
  $("empty")?.remove();
  const turn = make("article", `turn ${role}`), body = make("div", "body");
  turn.setAttribute("aria-label", role === "user" ? "You" : "Model");
  turn.append(body);
  log.append(turn);
  if (role === "user") { body.textContent = content; return turn; }
  const foot = make("footer", "foot"), note = make("span", "note");
  turn.text = content;
  foot.append(copyButton(() => turn.text, "Copy this answer"), note);
  turn.append(foot);
  render(body, content);
  return turn;
}

let follows = true; // until the reader scrolls up
const toEnd = () => { log.scrollTop = log.scrollHeight; };
log.addEventListener("scroll", () => { follows = log.scrollHeight - log.scrollTop - log.clientHeight < 60; });
new ResizeObserver(() => { if (follows) toEnd(); }).observe(log);

// ---------------------------------------------------------------- one answer
/** The data of every event in a response, however the bytes are cut. */
async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { value, done } = await reader.read();
    const lines = (rest + (value ?? "")).split(/\r\n|\n|\r(?!$)/);
    rest = done ? "" : lines.pop();
    for (const line of lines) if (line.startsWith("data:")) yield line.slice(5).trim();
    if (done) return;
  }
}

class Refused extends Error {
  constructor(message, canTryAgain = true) { super(message); this.canTryAgain = canTryAgain; }
}
/** With a capital, unless it begins with the name of a field, and a full stop. */
const sentence = (words) => words.replace(/^[a-z](?=[a-z]* )/, (first) => first.toUpperCase()).replace(/[^.!?]$/, "$&.");

async function refusal(response) {
  const what = await response.json().catch(() => null);
  const message = sentence(what?.error?.message ?? `The worker answered ${response.status}`);
  const wait = response.headers.get("retry-after");
  if (response.status === 401 || response.status === 403) openSettings(fields.key);
  const canTryAgain = response.status !== 413 && !what?.error?.param?.startsWith("messages"); // settings can be mended
  return new Refused(wait ? `${message} Try again in ${wait} s.` : message, canTryAgain);
}

function request() {
  const system = fields.system.value.trim();
  const body = {
    model: model || "default",
    messages: [...(system ? [{ role: "system", content: system }] : []), ...messages],
    stream: true,
    stream_options: { include_usage: true },
  };
  for (const name of NUMBERS) if (fields[name].value !== "") body[name] = Number(fields[name].value);
  return JSON.stringify(body);
}

let running = null; // the AbortController of the answer under way
let model = "";

async function answer() {
  const stop = running = new AbortController(), turn = show("assistant", "");
  const body = turn.querySelector(".body"), note = turn.querySelector(".note"), began = performance.now();
  const seen = { text: "", thought: "", pieces: 0, first: 0, last: 0, usage: null, end: "", drawn: true };
  setBusy(true);
  turn.classList.add("streaming");
  turn.setAttribute("aria-busy", "true");
  toEnd();
  const paint = () => {
    if (seen.drawn) return;
    seen.drawn = true;
    turn.text = seen.text;
    render(body, seen.text);
    think(turn, seen.thought);
    note.textContent = speedLine(seen, began);
    if (follows) toEnd();
  };
  const take = (chunk) => {
    if (chunk.error) throw new Refused(sentence(chunk.error.message ?? "The answer broke off"));
    if (chunk.usage) seen.usage = chunk.usage;
    for (const choice of chunk.choices ?? []) {
      const { content, reasoning_content: thought } = choice.delta ?? {};
      if (choice.finish_reason) seen.end = choice.finish_reason;
      if (!content && !thought) continue;
      seen.text += content ?? "";
      seen.thought += thought ?? "";
      seen.pieces += 1;
      seen.last = performance.now();
      seen.first ||= seen.last;
      if (seen.drawn) { seen.drawn = false; requestAnimationFrame(paint); }
    }
  };
  let problem = null;
  try {
    const response = await fetch(at("v1/chat/completions"), {
      method: "POST", signal: stop.signal, body: request(), headers: { "content-type": "application/json", ...headers() },
    });
    if (!response.ok) throw await refusal(response);
    for await (const data of events(response)) {
      if (data === "[DONE]") { seen.end ||= "stop"; break; }
      take(JSON.parse(data));
    }
    if (!seen.end) throw new Refused("The connection closed before the answer was complete.");
  } catch (error) {
    if (!stop.signal.aborted) problem = error instanceof Refused ? error : new Refused("The worker cannot be reached.");
  }
  seen.drawn = false;
  paint();
  turn.classList.remove("streaming");
  turn.removeAttribute("aria-busy");
  if (stop.signal.aborted) note.textContent = `stopped · ${note.textContent}`;
  else if (seen.end === "length") note.textContent += " · cut at the token limit";
  if (stop === running) { running = null; setBusy(false); }
  if (!turn.isConnected) return; // another chat has begun
  if (seen.text) { messages.push({ role: "assistant", content: seen.text }); keep(sessionStorage, "chat", messages); }
  if (problem) fail(turn, problem, seen.text);
  if (!problem && !seen.text && !seen.thought) note.textContent = stop.signal.aborted ? "stopped" : "an empty answer";
}

function speedLine(seen, began) {
  if (!seen.first) return "";
  const count = seen.usage?.completion_tokens ?? seen.pieces, span = (seen.last - seen.first) / 1000;
  const parts = [`${count} token${count === 1 ? "" : "s"}`];
  if (span > 0.05 && seen.pieces > 1) parts.push(`${figure((count - 1) / span)} tokens/s`);
  return [...parts, `first after ${Math.round(seen.first - began)} ms`].join(" · ");
}

function think(turn, thought) {
  if (!thought) return;
  let box = turn.querySelector(".thought");
  if (!box) {
    box = make("details", "thought");
    box.append(make("summary", "", "Reasoning"), make("div"));
    turn.prepend(box);
  }
  box.lastChild.textContent = thought.trim();
}

function fail(turn, problem, partial) {
  const box = make("div", "failure"), again = make("button", "tool", "Try again");
  box.setAttribute("role", "alert");
  again.type = "button";
  again.addEventListener("click", () => {
    if (running) return;
    if (messages.at(-1)?.role === "assistant") messages.pop();
    turn.remove();
    answer();
  });
  box.append(make("span", "", problem.message), ...(problem.canTryAgain ? [again] : []));
  if (!partial) turn.querySelector(".foot").remove();
  turn.append(box);
  toEnd();
}

function setBusy(isBusy) {
  $("send").hidden = isBusy;
  $("stop").hidden = !isBusy;
  ready();
}

function send() {
  const content = text.value.trim();
  if (!content || running) return;
  if (!options.checkValidity()) {
    openSettings(options.querySelector(":invalid"));
    options.reportValidity(); // which can only point at what is shown
    return;
  }
  text.value = "";
  fit();
  if (messages.at(-1)?.role === "user") messages.pop(); // its answer failed: this one takes its place
  messages.push({ role: "user", content });
  keep(sessionStorage, "chat", messages);
  show("user", content);
  answer();
  text.focus();
}

const ready = () => { $("send").disabled = !text.value.trim(); };
function fit() { // browsers without field-sizing
  text.style.height = "";
  if (!CSS.supports("field-sizing", "content")) text.style.height = `${text.scrollHeight}px`;
  ready();
}

text.addEventListener("input", fit);
text.addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send(); }
});
$("ask").addEventListener("submit", (event) => { event.preventDefault(); send(); });
$("stop").addEventListener("click", () => { running?.abort(); text.focus(); });
const fresh = $("empty").cloneNode(true);
$("new").addEventListener("click", () => {
  running?.abort();
  messages = [];
  keep(sessionStorage, "chat", messages);
  log.replaceChildren(fresh.cloneNode(true));
  text.focus();
});
document.addEventListener("keydown", (event) => {
  if (event.key === "Escape") running ? running.abort() : panel(false);
  if (event.altKey && event.code === "KeyN") { event.preventDefault(); $("new").click(); }
});

// ---------------------------------------------------------------- the panel, a drawer on narrow screens
function panel(isOpen) {
  const wasOpen = $("side").classList.contains("open");
  $("side").classList.toggle("open", isOpen);
  $("toggle").setAttribute("aria-expanded", String(isOpen));
  if (isOpen) $("close").focus();
  else if (wasOpen) $("toggle").focus();
}
function openSettings(field) {
  $("settings").open = true;
  if (getComputedStyle($("toggle")).display !== "none") panel(true);
  field?.focus();
}
$("toggle").addEventListener("click", () => panel(!$("side").classList.contains("open")));
$("close").addEventListener("click", () => panel(false));

// ---------------------------------------------------------------- the live view
const PERIOD_MS = 1000, HISTORY = 60;
const figure = (x) => (x >= 100 ? Math.round(x).toLocaleString("en") : x >= 10 ? x.toFixed(1) : x.toFixed(x ? 2 : 0));
const size = (bytes) => (bytes >= 1e9 ? `${(bytes / 1e9).toFixed(2)} GB` : `${(bytes / 1e6).toFixed(1)} MB`);
const span = (ms) => (ms >= 1000 ? `${+(ms / 1000).toPrecision(3)} s` : `${+ms.toPrecision(3)} ms`);
const past = { speed: [], running: [], waiting: [] };
let before = null, misses = 0;

/** The text format of Prometheus: name → [{labels, value}]. */
function parse(page) {
  const found = new Map();
  for (const line of page.split("\n")) {
    const match = line.match(/^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/);
    if (!match) continue;
    const labels = Object.fromEntries([...(match[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map((m) => [m[1], m[2]]));
    const value = match[3] === "+Inf" ? Infinity : Number(match[3]);
    found.set(match[1], [...(found.get(match[1]) ?? []), { labels, value }]);
  }
  return found;
}

function line(name, value, least) {
  const values = past[name];
  values.push(value);
  if (values.length > HISTORY) values.shift();
  const svg = $(`${name}-line`), height = svg.viewBox.baseVal.height, top = Math.max(least, ...values) * 1.15;
  const points = values.map((v, i) => `${HISTORY - values.length + i + 1},${(height - 1 - (v / top) * (height - 2)).toFixed(2)}`);
  svg.querySelector(".line").setAttribute("d", `M${points.join("L")}`);
  svg.querySelector(".area").setAttribute("d", `M${HISTORY - values.length + 1},${height}L${points.join("L")}L${HISTORY},${height}Z`);
}

function strip(used, cached, total) {
  const cells = Math.min(total, 256), node = $("strip"), per = total / (cells || 1);
  while (node.children.length < cells) node.append(make("i"));
  while (node.children.length > cells) node.lastChild.remove();
  [...node.children].forEach((cell, i) => { // a cell that stands for several blocks shows what is in its first
    const kind = i * per < used ? "used" : i * per < used + cached ? "cached" : "";
    if (cell.className !== kind) cell.className = kind;
  });
  $("blocks").textContent = `${used + cached} of ${total.toLocaleString("en")}`;
  node.setAttribute("aria-label", `Cache blocks: ${used} used, ${cached} cached, ${total - used - cached} free`);
}

const SVG = "http://www.w3.org/2000/svg";
function shape(tag, attributes, content = "") {
  const node = document.createElementNS(SVG, tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.textContent = content;
  return node;
}

/** Bars of the buckets between the first and the last that hold anything, one wide each. */
function histogram(id, what, buckets) {
  const totals = (buckets ?? []).map((b) => ({ bound: b.labels.le === "+Inf" ? Infinity : Number(b.labels.le), total: b.value }));
  const counts = totals.map((b, i) => b.total - (i ? totals[i - 1].total : 0)), all = totals.at(-1)?.total ?? 0;
  const svg = $(id), width = svg.clientWidth || 300, height = 72, floor = 56;
  svg.setAttribute("viewBox", `0 0 ${width} ${height}`);
  svg.replaceChildren(shape("rect", { class: "base", x: 0, y: floor, width, height: 1 }));
  const quantile = (q) => totals[totals.findIndex((b) => b.total >= q * all)]?.bound ?? 0;
  const told = (q) => { const bound = quantile(q); return bound === Infinity ? `> ${span(totals.at(-2).bound)}` : `≤ ${span(bound)}`; };
  const note = all ? `p50 ${told(0.5)} · p95 ${told(0.95)}` : "none yet";
  $(`${id}-note`).textContent = note;
  svg.setAttribute("aria-label", `${what}: ${note}`);
  if (!all) return;
  let from = counts.findIndex((n) => n > 0), to = counts.findLastIndex((n) => n > 0);
  while (to - from < 7 && (from > 0 || to < counts.length - 1)) { if (from > 0) from -= 1; if (to < counts.length - 1 && to - from < 7) to += 1; }
  const each = width / (to - from + 1), most = Math.max(...counts), every = Math.ceil(46 / each);
  for (let i = from; i <= to; i += 1) {
    const x = (i - from) * each, tall = counts[i] ? Math.max(2, (counts[i] / most) * (floor - 4)) : 0;
    const bar = shape("rect", { x: x + 1, y: floor - tall, width: Math.max(1, each - 2), height: tall, rx: 1.5 });
    const low = i ? totals[i - 1].bound : 0;
    bar.append(shape("title", {}, `${counts[i]} between ${span(low)} and ${totals[i].bound === Infinity ? "∞" : span(totals[i].bound)}`));
    svg.append(bar);
    if ((i - from) % every === every - 1 && totals[i].bound !== Infinity && i < to) {
      svg.append(shape("text", { x: x + each, y: height - 4, "text-anchor": "middle" }, span(totals[i].bound)));
    }
  }
}

function memory(purposes, inUse) {
  const items = purposes.filter((item) => item.value > 0).sort((a, b) => b.value - a.value);
  const total = items.reduce((sum, item) => sum + item.value, 0);
  $("memory-note").textContent = inUse ? `${size(inUse)} of VRAM in use` : total ? `${size(total)} of host memory` : "";
  const names = items.map((item) => `${item.labels.purpose.replaceAll("_", " ")} ${size(item.value)}`);
  $("memory").setAttribute("aria-label", `Memory by purpose: ${names.join(", ") || "unknown"}`);
  $("memory").replaceChildren(...items.map((item, i) => {
    const part = make("span", `p${Math.min(i, 5)}`);
    part.style.flexGrow = item.value;
    return part;
  }));
  $("memory-list").replaceChildren(...items.map((item, i) => {
    const row = make("li");
    row.append(make("span", `key p${Math.min(i, 5)}`), item.labels.purpose.replaceAll("_", " "), make("b", "", size(item.value)));
    return row;
  }));
}

function live(page, now) {
  const found = parse(page), one = (name) => found.get(name)?.[0]?.value ?? 0;
  const blocks = Object.fromEntries((found.get("worker_kv_blocks") ?? []).map((b) => [b.labels.state, b.value]));
  const tokens = one("worker_tokens_generated_total");
  const speed = before && tokens >= before.tokens ? (tokens - before.tokens) / ((now - before.now) / 1000) : 0;
  before = { tokens, now };
  $("speed").textContent = figure(speed);
  $("running").textContent = one("worker_running_requests");
  $("waiting").textContent = one("worker_waiting_requests");
  line("speed", speed, 10);
  line("running", one("worker_running_requests"), 4);
  line("waiting", one("worker_waiting_requests"), 4);
  strip(blocks.used ?? 0, blocks.cached ?? 0, one("worker_kv_capacity_blocks"));
  histogram("ttft", "Time to first token", found.get("worker_first_token_latency_ms_bucket"));
  histogram("itl", "Time between tokens", found.get("worker_per_token_latency_ms_bucket"));
  memory(found.get("worker_memory_bytes") ?? [], one("worker_vram_bytes"));
}

function setState(state, words) {
  if ($("state-text").textContent !== words) $("state-text").textContent = words;
  $("state").dataset.state = state;
}

const WORDS = { ready: "ready", busy: "answering", draining: "shutting down", failed: "failed" };
async function poll() {
  try {
    const [health, metrics] = await Promise.all([fetch(at("health"), { headers: headers() }), fetch(at("metrics"), { headers: headers() })]);
    misses = 0;
    if (metrics.ok) live(await metrics.text(), performance.now());
    const facts = await health.json().catch(() => ({}));
    if (metrics.status === 401) setState("key", "needs an API key");
    else if (facts.state) setState(facts.state, WORDS[facts.state] ?? facts.state);
    if (facts.model) { model = facts.model; $("model").textContent = [facts.model, facts.quant_kind, facts.device].filter(Boolean).join(" · "); }
  } catch {
    misses += 1;
    setState("away", "cannot be reached");
  }
}
async function watch() {
  if (!document.hidden) await poll();
  setTimeout(watch, Math.min(PERIOD_MS * 2 ** Math.min(misses, 3), 8000));
}

for (const message of messages) show(message.role, message.content);
toEnd();
fit();
watch();
