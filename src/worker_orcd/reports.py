"""What `inspect`, `plan` and `tokenize` print. No torch on the way here."""

from __future__ import annotations

import os
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from worker_orcd.assemble import draw_up, fill_vram, shortened
from worker_orcd.config import MIB, WorkerConfig, in_range
from worker_orcd.errors import InvalidRequest
from worker_orcd.gguf.reader import GgufFile, StringArray, Value
from worker_orcd.vram.card import free_vram_bytes

LONG_TEXT = 100  # characters of a value shown on screen
SHORT_ARRAY = 8  # elements of an array shown


def inspect_report(path: Path, as_json: bool) -> str:
    """Metadata and tensors of a file, as a table or as JSON. Raises ModelLoadFailed on a malformed file."""
    with GgufFile.open(path) as gguf:
        report = {
            "file": _encodable(path),
            "files": [_encodable(p) for p in gguf.paths],
            "size_bytes": gguf.size_bytes,
            "version": gguf.version,
            "alignment": gguf.alignment,
            "architecture": gguf.get("general.architecture", str, None),
            "quant_kind": gguf.quant_kind,
            "num_tensors": len(gguf.tensors),
            "tensor_bytes": sum(info.nbytes for info in gguf.tensors.values()),
            "parameters": sum(int(np.prod(info.shape, dtype=object)) for info in gguf.tensors.values()),
            "types": _by_type(gguf),
            "metadata": {key: _shown(value) for key, value in gguf.metadata.items()},
            "tensors": [
                {
                    "name": info.name,
                    "type": info.type.name,
                    "shape": list(info.shape),
                    "bytes": info.nbytes,
                    "offset": info.offset,
                }
                for info in gguf.tensors.values()
            ],
        }
    return _json(report) if as_json else _inspect_table(report)


def _by_type(gguf: GgufFile) -> dict[str, dict[str, int]]:
    counts, nbytes = Counter[str](), Counter[str]()
    for info in gguf.tensors.values():
        counts[info.type.name] += 1
        nbytes[info.type.name] += info.nbytes
    return {name: {"tensors": counts[name], "bytes": size} for name, size in nbytes.most_common()}


def _shown(value: Value) -> Any:
    """JSON-able form; a long array becomes its kind, length and first elements."""
    if isinstance(value, StringArray | np.ndarray):
        kind = "string" if isinstance(value, StringArray) else value.dtype.name
        first = value[:SHORT_ARRAY]
        elements = [str(x) for x in first] if kind == "string" else np.asarray(first).tolist()
        return elements if len(value) <= SHORT_ARRAY else {"array": kind, "length": len(value), "first": elements}
    return value


def _inspect_table(report: dict[str, Any]) -> str:
    lines = [
        f"{report['file']}: GGUF v{report['version']}, {_size(report['size_bytes'])}, "
        f"{_printable(report['architecture'] or 'no architecture')}, {report['quant_kind']}, "
        f"{report['parameters'] / 1e6:,.1f} M parameters",
        "",
        "metadata",
    ]
    for key, value in report["metadata"].items():
        text = value if isinstance(value, str) else msgspec.json.encode(value).decode()
        text = text.encode("unicode_escape").decode() if isinstance(value, str) else text
        lines.append(f"  {_printable(key):44} {text if len(text) <= LONG_TEXT else text[: LONG_TEXT - 1] + '…'}")
    lines += ["", f"types{'':41}tensors          bytes"]
    lines += [f"  {name:44}{t['tensors']:7} {t['bytes']:14,}" for name, t in report["types"].items()]
    lines += ["", "tensors"]
    lines += [
        f"  {_printable(t['name']):44} {t['type']:6} {'×'.join(map(str, t['shape'])):>16} {t['bytes']:14,}"
        for t in report["tensors"]
    ]
    return "\n".join(lines)


def plan_report(path: Path, config: WorkerConfig, as_json: bool, vram_total_mb: int | None = None) -> str:
    """Every byte `serve` would need, and whether so many are free. Raises ModelLoadFailed as `serve` would."""
    if vram_total_mb is not None:
        in_range("vram_total_mb", vram_total_mb, 1, 2**24)
    config = replace(config, model=path)
    free_bytes = free_vram_bytes(config.gpu_device) if config.device == "cuda" else None
    free_bytes = free_bytes if vram_total_mb is None else vram_total_mb * MIB
    blueprint = draw_up(config)
    if free_bytes is not None:
        blueprint = fill_vram(config, blueprint, free_bytes)
    gguf, plan, cache = blueprint.gguf, blueprint.plan, blueprint.cache
    gguf.close()
    report: dict[str, Any] = {
        "file": _encodable(path),
        "architecture": blueprint.spec.architecture,
        "quant_kind": gguf.quant_kind,
        "device": config.device,
        "place": plan.place,
        "context_length": blueprint.context_length,
        "tensor_bytes": sum(info.nbytes for info in gguf.tensors.values()),
        "items": [{"purpose": i.purpose, "bytes": i.nbytes, "detail": i.detail} for i in plan.items],
        "total_bytes": plan.total_bytes,
        "cache_tokens": cache.num_tokens,
        "kv_bytes_per_token": plan.nbytes("kv_cache") // cache.num_tokens,
        "free_bytes": free_bytes,
        "fits": None if free_bytes is None else plan.total_bytes <= free_bytes,
    }
    if as_json:
        return _json(report)
    backend = "reference" if config.is_reference else "cuda"
    lines = [f"{path}: {plan.place} needed with --device {config.device} ({backend} backend)"]
    lines += [f"  {item.purpose:14}{item.nbytes:16,}  {item.detail}" for item in plan.items]
    lines.append(f"  {'total':14}{plan.total_bytes:16,}  {_size(plan.total_bytes)}, the most at any time")
    lines.append(f"{cache.num_tokens:,} tokens of cache for up to {cache.context_length:,} tokens in a sequence")
    if warning := shortened(config, blueprint):
        lines.append(f"Note: {warning}.")
    if free_bytes is not None and plan.total_bytes <= free_bytes:
        lines.append(f"{_size(free_bytes)} free: fits")
    elif free_bytes is not None:
        room = plan.cache_room(free_bytes) // report["kv_bytes_per_token"]
        remedy = f"; it would with --context-length {room}" if room > 1 else ""
        lines.append(f"{_size(free_bytes)} free: {_size(plan.total_bytes - free_bytes)} too few{remedy}")
    elif not config.is_reference and config.kv_cache_size_mb is None:
        lines.append("On a GPU the cache becomes larger: it takes what is free.")
    return "\n".join(lines)


def tokenize_report(
    model: Path, tokenizer_json: Path | None, text: bytes, add_special: bool, parse_special: bool
) -> str:
    """{"ids": [...]} of UTF-8 text. Raises InvalidRequest naming the offset of a byte that is not UTF-8."""
    from worker_orcd.tokenizer.load import load_tokenizer

    try:
        decoded = text.decode()
    except UnicodeDecodeError as error:
        raise InvalidRequest(f"the text is not UTF-8 at byte {error.start}") from None
    with GgufFile.open(model) as gguf:
        tokenizer = load_tokenizer(gguf, tokenizer_json)
    return _json({"ids": tokenizer.encode(decoded, add_special=add_special, parse_special=parse_special)})


def _json(value: Any) -> str:
    return msgspec.json.encode(value).decode()


def _printable(name: str) -> str:
    return name.encode("unicode_escape").decode()


def _encodable(path: Path) -> str:
    """A path as text; bytes of a name that are not UTF-8 are escaped."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _size(nbytes: int) -> str:
    return f"{nbytes / 1e9:,.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:,.2f} MB"
