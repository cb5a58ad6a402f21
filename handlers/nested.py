"""Nested lists of JSON as one flat list and a shape."""

from __future__ import annotations

from itertools import chain
from typing import Any


def flatten(value: object) -> tuple[list[Any], tuple[int, ...], set[type]]:
    """Lay nested lists out flat, level by level.

    Not with NumPy: it would make numbers of booleans, and pad every string to the longest one, which lets a request of
    a few megabytes ask for terabytes; and for the few numbers of a usual request it takes three times as long.

    Args:
        value: What JSON parsing gave. Anything but a list is a scalar.

    Returns:
        The innermost items in order, the sizes of the levels, outermost first, and the types among the items: ``list``
        is one of them if, and only if, the lists of one level differ in length or stand beside something else.
    """
    if type(value) is not list:
        return [value], (), {type(value)}
    items = value
    shape = [len(items)]
    types = set(map(type, items))
    while types == {list}:
        lengths = set(map(len, items))
        if len(lengths) != 1:
            break
        shape.append(lengths.pop())
        items = list(chain.from_iterable(items))
        types = set(map(type, items))
    return items, tuple(shape), types
