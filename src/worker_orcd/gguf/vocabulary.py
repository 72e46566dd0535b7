"""Checks of the embedded tokenizer's arrays against one another, done when a file is opened."""

from __future__ import annotations

from worker_orcd.gguf.access import TypedAccess

_PREFIX = "tokenizer.ggml."


def check_vocabulary(values: TypedAccess) -> None:
    """Per-token arrays must be as long as the token list, special ids lie inside it. Raises GgufError."""
    tokens = values.get(_PREFIX + "tokens", "strings", None)
    if tokens is None:
        return
    per_token = {"scores": values.get(_PREFIX + "scores", "floats", None)}
    per_token["token_type"] = values.get(_PREFIX + "token_type", "ints", None)
    for name, numbers in per_token.items():
        if numbers is not None and len(numbers) != len(tokens):
            raise values.error(_PREFIX + name, f"has {len(numbers)} entries for {len(tokens)} tokens")
    for key in values.metadata:
        if key.startswith(_PREFIX) and key.endswith("_token_id"):
            values.require(key, int, min=0, max=len(tokens) - 1)
