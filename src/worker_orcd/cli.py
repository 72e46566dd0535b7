"""The command line: serve · chat · haiku · bench · replay · doctor · pull · inspect · plan · tokenize · logits.

Flags win over `LLORCH_*` variables, which win over the YAML file (`--config` or LLORCH_CONFIG), which wins over
defaults; all four come from WorkerConfig. A failure is one line, `CODE: message`, on stderr and exit status 1.
What a command needs is imported inside it: `inspect`, `plan` and `tokenize` must not wait for torch.
"""

from __future__ import annotations

import contextlib
import io
import os
import signal
import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

from cyclopts import App, CycloptsError, Parameter
from cyclopts.config import Env, Yaml

from worker_orcd import __version__
from worker_orcd.commands.options import BenchOptions
from worker_orcd.config import INTEGER, WorkerConfig
from worker_orcd.errors import InvalidRequest, StartFailed, WorkerError
from worker_orcd.signals import StopRequest, stoppable

DEFAULTS = WorkerConfig()
BENCH_DEFAULTS = BenchOptions()

app = App(
    name="worker-orcd",
    help="Serve one GGUF model over HTTP, resident in VRAM, with reproducible answers.",
    version=__version__,
    help_format="plaintext",
    suppress_keyboard_interrupt=False,
)


@app.command
def serve(*, config: WorkerConfig = DEFAULTS) -> int:
    """Load the model and answer requests until SIGTERM or POST /shutdown.

    Events go to stderr, one JSON object a line.
    """
    with StopRequest() as stop:
        from worker_orcd.worker import run_worker

        return run_worker(config, stop)


@app.command
def haiku(
    *,
    prompt: Annotated[str, Parameter(help="What to ask for.")] = "Write a haiku about GPU computing",
    json: Annotated[bool, Parameter(help="End with one JSON line.", negative="")] = False,
    config: WorkerConfig = DEFAULTS,
) -> int:
    """Start a worker, stream a haiku twice, say whether both were the same and how fast, stop the worker."""
    with stoppable():  # SIGTERM must not leave the worker behind
        from worker_orcd.commands.haiku import run_haiku

        return run_haiku(config, prompt, json)


@app.command
def chat(
    *,
    url: Annotated[str | None, Parameter(help="Talk to this server instead of starting a worker.")] = None,
    system: Annotated[str, Parameter(help="System prompt.")] = "",
    config: WorkerConfig = DEFAULTS,
) -> int:
    """Converse with the model. From a pipe: one question a line, the answers on stdout."""
    from worker_orcd.commands.chat import run_chat

    return run_chat(config, url, system)


@app.command
def bench(*, options: BenchOptions = BENCH_DEFAULTS, config: WorkerConfig = DEFAULTS) -> int:
    """Measure a model at several batch sizes, in this process or over HTTP; --synthetic needs no download."""
    from worker_orcd.commands.bench import run_bench

    with stoppable():
        return run_bench(config, options)


@app.command
def replay(
    receipt: Annotated[Path, Parameter(help="File with a receipt, or the body, event or stream that carries it.")],
    /,
    *,
    config: WorkerConfig = DEFAULTS,
) -> int:
    """Run the request of a replay receipt again and compare the token ids. Exit 1 when they differ."""
    from worker_orcd.commands.replay import run_replay

    return run_replay(receipt, config)


@app.command
def pull(
    source: Annotated[str, Parameter(help="owner/repo:file.gguf, or owner/repo:QUANT as in Q4_K_M.")],
    /,
    *,
    to: Annotated[Path, Parameter(help="Folder for the file.")] = Path(),
    revision: Annotated[str, Parameter(help="Branch, tag or commit.")] = "main",
    endpoint: Annotated[str, Parameter(help="Hub to ask.")] = "https://huggingface.co",
    allow_host: Annotated[
        tuple[str, ...], Parameter(help="Further host that may be asked.", negative="", show_default=False)
    ] = (),
) -> int:
    """Download a GGUF file from the Hugging Face hub, resuming and checking it."""
    from worker_orcd.commands.pull import run_pull

    with stoppable():
        return run_pull(source, to, revision, endpoint, allow_host)


@app.command
def doctor(
    *,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
    config: WorkerConfig = DEFAULTS,
) -> int:
    """Say whether this machine can serve, what is missing, and which models fit. Exit 1 when something is missing."""
    from worker_orcd.commands.doctor import run_doctor

    return run_doctor(config, json)


@app.command
def inspect(
    file: Annotated[Path, Parameter(help="GGUF file; the first one of a split model.")],
    /,
    *,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
) -> int:
    """Show what a GGUF file holds: metadata, tensors by type and bytes. Exit 1 when it is malformed."""
    from worker_orcd.reports import inspect_report

    print(inspect_report(file, json))
    return 0


@app.command
def plan(
    file: Annotated[Path, Parameter(help="GGUF file; the first one of a split model.")],
    /,
    *,
    json: Annotated[bool, Parameter(help="Print JSON.", negative="")] = False,
    vram_total_mb: Annotated[int | None, INTEGER, Parameter(help="Plan for an empty GPU of so many MiB.")] = None,
    config: WorkerConfig = DEFAULTS,
) -> int:
    """Show every byte `serve` would need for this file, read from its header alone."""
    from worker_orcd.reports import plan_report

    print(plan_report(file, config, json, vram_total_mb))
    return 0


@app.command
def tokenize(
    *,
    model: Annotated[Path, Parameter(help="GGUF file; one that holds only a vocabulary will do.")],
    tokenizer_json: Annotated[Path | None, Parameter(help="Use this tokenizer.json.")] = None,
    add_special: Annotated[bool, Parameter(help="Add BOS and EOS as the file asks for.")] = False,
    parse_special: Annotated[bool, Parameter(help="Read special tokens out of the text.")] = True,
) -> int:
    """Turn UTF-8 text on stdin into token ids: {"ids": [...]}."""
    from worker_orcd.reports import tokenize_report

    if sys.stdin is None:
        raise InvalidRequest("the text is read from stdin, which is closed")
    print(tokenize_report(model, tokenizer_json, sys.stdin.buffer.read(), add_special, parse_special))
    return 0


@app.command
def logits(
    *,
    ids: Annotated[str, Parameter(help="Token ids, as 1,2,3.")],
    out: Annotated[Path, Parameter(help="Where to write the .npy file: float32 [tokens, vocab].")],
    config: WorkerConfig = DEFAULTS,
) -> int:
    """Write the logits of every position of a token sequence."""
    from worker_orcd.worker import write_logits

    write_logits(config, ids, out)
    return 0


@app.meta.default
def launch(
    *tokens: Annotated[str, Parameter(show=False, allow_leading_hyphen=True)],
    config: Annotated[Path | None, Parameter(name="--config", env_var="LLORCH_CONFIG", help="YAML file.")] = None,
) -> int:
    """Read the configuration file, then run the command."""
    sources: list[Callable[..., None]] = [Env("LLORCH_", command=False)]
    if config is not None:
        sources.append(lambda *where: _yaml(config)(*where))  # not read for commands without settings
    for command in (serve, haiku, chat, bench, doctor, plan, logits, replay):
        app[command.__name__].config = sources
    return int(app(tokens, exit_on_error=False, result_action="return_value") or 0)


def _yaml(path: Path) -> Yaml:
    import yaml

    if not path.is_file():
        raise StartFailed(f"config {path} is not a regular file")
    try:
        loader = yaml.SafeLoader(path.read_bytes())
        document = loader.get_single_node()
        settings = (document and loader.construct_document(document)) or {}
    except OSError as error:
        raise StartFailed(f"config {path}: {error.strerror}") from None
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise StartFailed(f"config {path} is not YAML: {str(error).splitlines()[0]}") from None
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise StartFailed(f"config {path} must hold `name: value` lines")
    names = Counter(key.value for key, _ in document.value) if document and settings else Counter()
    if twice := [name for name, count in names.items() if count > 1]:
        raise StartFailed(f"config {path} has {twice[0]!r} twice")
    if no_settings := [key for key in settings if key in app or key == "config"]:  # which cyclopts would pass over
        raise StartFailed(f"config {path}: {no_settings[0]!r} is no setting; settings stand at the top level")
    return Yaml(path, must_exist=True, use_commands_as_keys=False)


def main() -> None:
    """Console script. Never shows a traceback for something the user can mend."""
    _open_standard_files()
    for name in [name for name, value in os.environ.items() if name.startswith("LLORCH_") and not value]:
        del os.environ[name]  # empty is unset, as in compose files
    try:
        status = app.meta(exit_on_error=False, print_error=False, result_action="return_value")
        if sys.stdout is not None:  # it may have been closed before we began
            sys.stdout.flush()
    except CycloptsError as error:
        status = _fail("WORKER_START_FAILED", str(error))
    except WorkerError as error:
        status = _fail(error.code, error.message)
    except KeyboardInterrupt:
        status = 128 + signal.SIGINT
    except OSError as error:  # of our own output: the reader left, or the disk is full
        with contextlib.suppress(OSError):
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 1 if isinstance(error, BrokenPipeError) else _fail("INTERNAL", f"cannot write: {error.strerror}")
    except MemoryError:
        status = _fail("INTERNAL", "out of memory")
    sys.exit(status)


def _fail(code: str, message: str) -> int:
    """One line on stderr whatever is in `message`: names in it may come from a hostile file."""
    line = "".join(c if c.isprintable() else ascii(c)[1:-1] for c in message.strip())
    print(f"{code}: {line}", file=sys.stderr)
    return 1


def _open_standard_files() -> None:
    """Give closed standard files their numbers back, lest a socket takes one; escape what cannot be encoded."""
    for fd in range(3):
        try:
            os.fstat(fd)
        except OSError:
            os.open(os.devnull, os.O_RDWR)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
