"""`worker-orcd chat`: a conversation in the terminal, or one question a line from a pipe.

The worker is one of our own, started for it, or one that runs (--url). Ctrl-C ends an answer, not the program.
"""

from __future__ import annotations

import json
import signal
import sys
import time
from collections.abc import Callable
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console
from rich.text import Text

from worker_orcd.commands.client import RequestRefused, WorkerClient, refusal_of
from worker_orcd.commands.worker_process import private, running_worker
from worker_orcd.config import WorkerConfig
from worker_orcd.errors import InvalidRequest, WorkerError
from worker_orcd.signals import Interrupts

SETTINGS: dict[str, type[int] | type[float]] = {
    "temperature": float,
    "top_p": float,
    "top_k": int,
    "min_p": float,
    "max_tokens": int,
    "seed": int,
    "presence_penalty": float,
    "frequency_penalty": float,
    "repetition_penalty": float,
}
HELP = """\
/set NAME VALUE   choose a sampling setting; without a value back to the default; alone, show all
/system TEXT      system prompt for the next answers; without a text, none
/reset            forget the conversation
/save FILE        write conversation and settings as JSON
/help             this
/quit             leave (also Ctrl-D)
Ctrl-C ends an answer. The settings are """ + ", ".join(SETTINGS) + "."  # fmt: skip


@dataclass
class Conversation:
    """What is said so far and how to go on."""

    system: str = ""
    settings: dict[str, int | float] = field(default_factory=dict)
    turns: list[dict[str, str]] = field(default_factory=list)

    @property
    def messages(self) -> list[dict[str, str]]:
        return [*([{"role": "system", "content": self.system}] if self.system else []), *self.turns]

    def set(self, words: str) -> str:
        """Follow `/set`; what to tell. Raises InvalidRequest."""
        name, _, value = words.replace("=", " ", 1).partition(" ")
        if not name:
            return "\n".join(f"{name} {self.settings.get(name, 'default')}" for name in SETTINGS)
        if name not in SETTINGS:
            raise InvalidRequest(f"no setting is called {name!r}; there are {', '.join(SETTINGS)}")
        if not value.strip():
            self.settings.pop(name, None)
            return f"{name} default"
        try:
            self.settings[name] = SETTINGS[name](value)
        except ValueError:
            kind = "a whole number" if SETTINGS[name] is int else "a number"
            raise InvalidRequest(f"{name} is {value.strip()!r}; {kind} is needed") from None
        return f"{name} {self.settings[name]}"

    def direct(self, text: str) -> str:
        """Follow `/system`; what to tell."""
        self.system = text
        return "system prompt set" if text else "no system prompt"

    def reset(self, _: str = "") -> str:
        """Follow `/reset`; what to tell."""
        self.turns.clear()
        return "forgotten"

    def forget_unanswered(self) -> None:
        """Of a question that failed, or an interrupt before the first word of an answer."""
        if self.turns and self.turns[-1]["role"] == "user":
            self.turns.pop()

    def save(self, path: str) -> str:
        """Follow `/save`; what to tell. Raises InvalidRequest."""
        if not path:
            raise InvalidRequest("/save needs the name of a file")
        document = {"messages": self.messages} | self.settings
        try:
            Path(path).expanduser().write_text(json.dumps(document, indent=1, ensure_ascii=False) + "\n")
        except OSError as error:
            raise InvalidRequest(f"cannot write {path}: {error.strerror}") from None
        return f"{len(self.messages)} messages in {path}"


@dataclass
class Answer:
    """An answer as it comes. Times in seconds of time.perf_counter."""

    began_s: float
    text: str = ""
    num_pieces: int = 0
    num_tokens: int | None = None  # as the server counts
    first_s: float = 0.0
    last_s: float = 0.0

    def speed_line(self) -> str:
        count = self.num_tokens if self.num_tokens is not None else self.num_pieces
        if not self.num_pieces:
            return f"{count} tokens"
        seconds = self.last_s - self.first_s
        speed = f" · {(count - 1) / seconds:.1f} tokens/s" if seconds > 0 and count > 1 else ""
        return f"{count} tokens{speed} · first token {(self.first_s - self.began_s) * 1e3:.0f} ms"


class Terminal:
    """Where it is shown: with colour and a speed line in a terminal, else answers alone on stdout."""

    def __init__(self) -> None:
        self.is_interactive = sys.stdin.isatty() and sys.stdout.isatty()
        self.console = Console(highlight=False, markup=False, soft_wrap=True)
        self.interrupts = Interrupts()

    def line(self) -> str | None:
        """What the person types next; None at the end of the input."""
        if not self.is_interactive:
            line = sys.stdin.readline()
            return line.rstrip("\r\n") if line else None
        with suppress(ImportError):
            import readline  # noqa: F401 - gives input() its history and keys
        try:
            return input("\001\033[1;36m\002> \001\033[0m\002")
        except EOFError:
            self.console.print()
            return None

    def piece(self, text: str, is_thought: bool) -> None:
        """Part of an answer; what could steer the terminal is left out there."""
        if self.is_interactive:
            shown = "".join(c for c in text if c.isprintable() or c in "\n\t")
            self.console.print(Text(shown, style="dim italic" if is_thought else ""), end="")
        elif not is_thought:
            print(text, end="", flush=True)

    def note(self, text: str) -> None:
        if self.is_interactive:
            self.console.print(Text(text, style="dim"))

    def problem(self, error: WorkerError) -> None:
        line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in f"{error.code}: {error.message}")
        if self.is_interactive:
            self.console.print(Text(line, style="red"))
        else:
            print(line, file=sys.stderr)


def run_chat(config: WorkerConfig, url: str | None, system: str) -> int:
    """Exit status: 1 when a question of a pipe was not answered."""
    if sys.stdin is None:
        raise InvalidRequest("questions are read from stdin, which is closed")
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, _leave)  # a worker of ours must not stay behind
    terminal, conversation = Terminal(), Conversation(system)
    with ExitStack() as stack:
        if url is None:
            config = private(config)
            with terminal.console.status("loading …") if terminal.is_interactive else nullcontext():
                stack.enter_context(running_worker(config))
            url = f"http://127.0.0.1:{config.port}"
        client = WorkerClient(url, config.api_key, config.inference_timeout_sec)
        model = client.model()
        if terminal.is_interactive:
            terminal.interrupts.install()
        terminal.note(f"{model} · /help lists what else can be typed")
        return _converse(client, model, conversation, terminal)


def _leave(number: int, _frame: object) -> NoReturn:
    sys.exit(128 + number)


def _converse(client: WorkerClient, model: str, conversation: Conversation, terminal: Terminal) -> int:
    status = 0
    while True:
        try:
            with terminal.interrupts:
                line = terminal.line()
        except KeyboardInterrupt:
            if not terminal.is_interactive:
                raise
            terminal.console.print()
            terminal.note("Ctrl-D or /quit leaves")
            continue
        if line is None or line.strip() in ("/quit", "/exit"):
            return status
        try:
            if line.startswith("/"):
                terminal.note(_command(line, conversation))
            elif line.strip():
                _turn(client, model, conversation, terminal, line)
        except WorkerError as error:
            terminal.problem(error)
            status = 0 if terminal.is_interactive else 1
        finally:
            conversation.forget_unanswered()


def _command(line: str, conversation: Conversation) -> str:
    name, _, words = line[1:].strip().partition(" ")
    commands: dict[str, Callable[[str], str]] = {
        "set": conversation.set,
        "system": conversation.direct,
        "reset": conversation.reset,
        "save": conversation.save,
        "help": lambda _: HELP,
    }
    if name not in commands:
        raise InvalidRequest(f"/{name} is no command; /help lists them")
    return commands[name](words.strip())


def _turn(client: WorkerClient, model: str, conversation: Conversation, terminal: Terminal, question: str) -> None:
    """Ask and show; a question that failed is forgotten, what an interrupted answer said is kept."""
    conversation.turns.append({"role": "user", "content": question})
    answer, end = Answer(time.perf_counter()), ""
    body = {
        "model": model,
        "messages": conversation.messages,
        "stream": True,
        "stream_options": {"include_usage": True},
    }
    try:
        with terminal.interrupts:
            _stream(client, body | conversation.settings, answer, terminal)
    except KeyboardInterrupt:
        end = " · stopped"
    except WorkerError:
        if answer.num_pieces:
            terminal.piece("\n", is_thought=False)
        raise
    if answer.text:
        conversation.turns.append({"role": "assistant", "content": answer.text})
    if terminal.is_interactive or not answer.text.endswith("\n"):
        terminal.piece("\n", is_thought=False)
    terminal.note(answer.speed_line() + end)


def _stream(client: WorkerClient, body: dict[str, Any], answer: Answer, terminal: Terminal) -> None:
    """Fill `answer` from the stream. Raises RequestRefused when it carries an error or has no end."""
    is_whole = False
    with closing(client.events("/v1/chat/completions", body)) as events:
        for _, chunk in events:
            if chunk is None:
                return
            if chunk.get("error"):
                raise refusal_of(chunk["error"], "the answer broke off")
            if chunk.get("usage"):
                answer.num_tokens = int(chunk["usage"].get("completion_tokens", 0))
            for choice in chunk.get("choices") or ():
                is_whole = is_whole or bool(choice.get("finish_reason"))
                _take(choice.get("delta") or {}, answer, terminal)
    if not is_whole:
        raise RequestRefused("the connection closed before the answer was complete")


def _take(delta: dict[str, Any], answer: Answer, terminal: Terminal) -> None:
    text, thought = delta.get("content") or "", delta.get("reasoning_content") or ""
    if not text and not thought:
        return
    answer.last_s = time.perf_counter()
    answer.first_s = answer.first_s or answer.last_s
    answer.num_pieces += 1
    if thought:
        terminal.piece(thought, is_thought=True)
    answer.text += text
    if text:
        terminal.piece(text, is_thought=False)
