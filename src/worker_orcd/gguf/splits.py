"""Models cut into several files named `<stem>-00001-of-0000N.gguf`; the first one has the metadata."""

from __future__ import annotations

import re
from pathlib import Path

from worker_orcd.gguf.access import TypedAccess
from worker_orcd.gguf.source import GgufError

MAX_SPLITS = 512
_NAME = re.compile(r"(?s)(?P<stem>.*)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf\Z")


def sibling_paths(first: TypedAccess) -> list[Path]:
    """Paths of the other files of the set that `first` begins; none when the model is a single file."""
    count = first.get("split.count", int, 1, min=0, max=MAX_SPLITS)
    name = _NAME.match(first.path.name)
    if name and int(name["number"]) != 1 and int(name["count"]) > 1:
        begin = f"{name['stem']}-00001-of-{name['count']}.gguf"
        raise GgufError(first.path, "split.no", None, f"is a later file of a split model, open {begin}")
    if count <= 1 and (name is None or int(name["count"]) == 1):
        return []
    if name is None or int(name["count"]) != count:
        problem = f"{count} files, but the name does not end in -00001-of-{count:05}.gguf: rename it"
        raise first.error("split.count", problem)
    check_member(first, 0, count)
    return [first.path.with_name(f"{name['stem']}-{i:05}-of-{count:05}.gguf") for i in range(2, count + 1)]


def check_member(member: TypedAccess, index: int, count: int) -> None:
    """Check that the file says of itself that it is number `index` (from 0) of `count`."""
    for key, expected in (("split.no", index), ("split.count", count)):
        found = member.require(key, int)
        if found != expected:
            raise member.error(key, f"{found}, the file's name and place say {expected}")


def check_total(first: TypedAccess, num_tensors: int) -> None:
    """Check the number of tensors in all files of the set."""
    expected = first.require("split.tensors.count", int)
    if num_tensors != expected:
        raise first.error("split.tensors.count", f"{expected}, the files of the set have {num_tensors}")
