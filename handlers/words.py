"""What a client sent, in words that are short and printable: they go into messages, and into logs."""

from __future__ import annotations

import heapq
from collections.abc import Sequence

_KINDS = {
    list: "a list",
    str: "a string",
    bool: "a boolean",
    int: "a number",
    float: "a number",
    type(None): "null",
}


def kind(value: object) -> str:
    """What a JSON value is."""
    return _KINDS.get(type(value), "an object")


def shown_shape(shape: Sequence[int]) -> str:
    """A shape, the first few axes of it."""
    sizes = [str(size) for size in shape[:8]]
    return f"[{', '.join(sizes if len(shape) == len(sizes) else [*sizes, '...'])}]"


def shown_keys(keys: Sequence[object]) -> str:
    """Keys of a client's object, the first few of them."""
    return ", ".join(ascii(str(key)[:40]) for key in heapq.nsmallest(5, keys, key=str)) or "no key at all"
