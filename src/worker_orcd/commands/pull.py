"""`worker-orcd pull`: fetch a GGUF file of the Hugging Face hub. No other command goes to the network.

The transfer is huggingface_hub's, which resumes a broken one. Around it: every request, redirects included, goes to a
host on the list or not at all, and a file is kept only if its SHA-256 is what the hub says.
"""

from __future__ import annotations

import hashlib
import ipaddress
import os
import re
import shutil
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console

from worker_orcd.errors import InvalidRequest, WorkerError
from worker_orcd.gguf.reader import GgufFile

ENDPOINT = "https://huggingface.co"
HOSTS = ("huggingface.co", "hf.co")  # and what is below them: where the hub redirects downloads to
CHUNK_BYTES = 2**22
SOURCE = re.compile(r"(?P<repo>(?![.-])[\w.-]+(?<![.-])/(?![.-])[\w.-]+(?<![.-]))(?::(?P<what>.+))?", re.ASCII)
PART = re.compile(r"-\d{5}-of-\d{5}(?=\.gguf$)", re.IGNORECASE)


class PullFailed(WorkerError):
    """Nothing usable was fetched; what came so far is kept and used by the next attempt."""

    code = "PULL_FAILED"


@dataclass(frozen=True)
class RemoteFile:
    """One file of a repository; `sha256` is None for the few that are not stored as large files."""

    name: str
    nbytes: int
    sha256: str | None


def run_pull(source: str, folder: Path, revision: str, endpoint: str, allow_host: Sequence[str]) -> int:
    """Fetch what `source` names (owner/repo:file.gguf or owner/repo:QUANT) into `folder`; show where it is.

    Raises InvalidRequest for a source that cannot be meant, PullFailed when the hub or the network refuse.
    """
    parsed = SOURCE.fullmatch(source)
    if parsed is None:
        raise InvalidRequest(f"source is {source!r}; owner/repo:file.gguf or owner/repo:QUANT is needed")
    console = Console(stderr=True)
    check_host(endpoint, (*HOSTS, *allow_host))
    hub = _Hub(parsed["repo"], endpoint.rstrip("/"), (*HOSTS, *allow_host))
    commit, files = hub.files(revision)
    chosen = choose(files, parsed["what"], parsed["repo"])
    folder.mkdir(parents=True, exist_ok=True)
    _check_room(folder, chosen)
    for file in chosen:
        path = hub.fetch(file.name, commit, folder)
        with console.status(f"checking {path.name} …"):
            _verify(path, file)
    first = folder / chosen[0].name
    with GgufFile.open(first) as gguf:
        kind = gguf.quant_kind
    console.print(f"{kind}, {sum(file.nbytes for file in chosen) / 1e9:.2f} GB, checked. Serve it with:")
    print(f"worker-orcd serve --model {first}")
    return 0


def choose(files: Sequence[RemoteFile], what: str | None, repo: str) -> list[RemoteFile]:
    """The file called `what`, or the one whose name holds it as a word; all parts if it is split. Parts in order."""
    models = [file for file in files if file.name.lower().endswith(".gguf") and _is_safe(file.name)]
    if what and what.lower().endswith(".gguf"):
        named = [file for file in models if what in (file.name, PurePosixPath(file.name).name)]
    else:
        word = re.compile(rf"(?<![A-Za-z0-9]){re.escape(what or '')}(?![A-Za-z0-9_])", re.IGNORECASE)
        named = [file for file in models if what and word.search(file.name) and "mmproj" not in file.name.lower()]
    whole = {PART.sub("", file.name) for file in named}
    if len(whole) != 1:
        there = ", ".join(sorted({PART.sub("", file.name) for file in named or models})) or "no GGUF file"
        found = "names no file" if not named else "names several files"
        raise InvalidRequest(f"{what or 'the source'} {found} of {repo}; there are: {there}")
    return sorted((file for file in models if PART.sub("", file.name) in whole), key=lambda file: file.name)


def _is_safe(name: str) -> bool:
    """Whether a name from the network stays inside the folder it is meant for."""
    path = PurePosixPath(name)
    return not path.is_absolute() and ".." not in path.parts and name.isprintable()


def check_host(url: str, allowed: Sequence[str]) -> None:
    """Raises PullFailed unless the host of `url`, or one above it, is allowed; loopback alone may do without TLS."""
    try:
        parts = urlsplit(url)
        host = (parts.hostname or "").lower() if parts.port != 0 else ""
    except ValueError:
        host = ""
    if not host:
        raise PullFailed(f"{url!r} names no host and port; an address such as {ENDPOINT} is needed")
    if not any(host == name or host.endswith(f".{name}") for name in allowed):
        raise PullFailed(f"{host} is not on the list of hosts to download from; --allow-host {host} puts it there")
    if parts.scheme != "https" and not (parts.scheme == "http" and _is_loopback(host)):
        raise PullFailed(f"{url!r} is not HTTPS")


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


class _Hub:
    """One repository, through huggingface_hub with a guard on its requests."""

    def __init__(self, repo: str, endpoint: str, allowed: Sequence[str]) -> None:
        os.environ["HF_HUB_DISABLE_XET"] = (
            "1"  # its transfers do not pass the guard; read when the library is imported
        )
        try:
            import huggingface_hub
        except ImportError:
            raise PullFailed("huggingface_hub is not installed; pip install 'worker-orcd[hub]' brings it") from None
        session = huggingface_hub.get_session()
        hooks = session.event_hooks
        hooks["request"].insert(0, lambda request: check_host(str(request.url), allowed))
        session.event_hooks = hooks
        self._hub, self._repo, self._endpoint = huggingface_hub, repo, endpoint
        self._token = None if endpoint == ENDPOINT else False  # the stored token is the hub's own

    def files(self, revision: str) -> tuple[str, list[RemoteFile]]:
        """The commit that `revision` is, and its files."""
        try:
            api = self._hub.HfApi(endpoint=self._endpoint, token=self._token)
            info = api.model_info(self._repo, revision=revision, files_metadata=True)
        except Exception as error:
            raise self._failure(error) from error
        files = [
            RemoteFile(file.rfilename, file.size or 0, file.lfs.sha256 if file.lfs else None)
            for file in info.siblings or ()
        ]
        return info.sha or revision, files

    def fetch(self, name: str, commit: str, folder: Path) -> Path:
        """The path of a file that is complete; shows a progress bar on stderr."""
        try:
            return Path(
                self._hub.hf_hub_download(
                    self._repo, name, revision=commit, local_dir=folder, endpoint=self._endpoint, token=self._token
                )
            )
        except Exception as error:
            raise self._failure(error) from error

    def _failure(self, error: Exception) -> WorkerError:
        """In words for the user; what the library raises beyond its own errors is the business of its HTTP client."""
        if isinstance(error, WorkerError):
            return error
        errors: Any = self._hub.errors
        if isinstance(error, errors.GatedRepoError):
            return PullFailed(f"{self._repo} asks for consent first; give it on its page and set HF_TOKEN")
        if isinstance(error, errors.RepositoryNotFoundError):
            return PullFailed(f"{self._repo} was not found on {self._endpoint}, or is private: set HF_TOKEN")
        if isinstance(error, errors.RevisionNotFoundError):
            return PullFailed(f"{self._repo} has no such revision")
        if isinstance(error, errors.OfflineModeIsEnabled):
            return PullFailed("HF_HUB_OFFLINE is set; unset it to download")
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return PullFailed(f"{self._endpoint}: {reason}; the same command goes on where it stopped")


def _check_room(folder: Path, files: Sequence[RemoteFile]) -> None:
    here = sum((folder / file.name).stat().st_size for file in files if (folder / file.name).is_file())
    needed, free = sum(file.nbytes for file in files) - here, shutil.disk_usage(folder).free
    if needed > free:
        raise PullFailed(f"{needed} bytes are needed in {folder}, {free} are free; choose another folder with --to")


def _verify(path: Path, file: RemoteFile) -> None:
    """Raises PullFailed, and removes the file, when it is not what the hub says."""
    digest = hashlib.sha256()
    with path.open("rb") as stream:
        while chunk := stream.read(CHUNK_BYTES):
            digest.update(chunk)
    is_right = path.stat().st_size == file.nbytes if file.sha256 is None else digest.hexdigest() == file.sha256
    if not is_right:
        path.unlink()
        raise PullFailed(f"{path} is not what the hub says it is (SHA-256) and was removed; run the command again")
