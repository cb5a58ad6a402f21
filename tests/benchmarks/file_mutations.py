"""What can be wrong with a file that people write: damaged bytes, odd YAML, another structure, other values."""

import copy
import datetime
import json
import random
from collections.abc import Callable
from typing import Any

import yaml

DEEP: list[Any] = []
for _ in range(60):
    DEEP = [DEEP]

VALUES: tuple[Any, ...] = (
    *(None, True, False, "yes", "no", "null", "", " ", "~", "NaN", "1e-3", "0x10", "a: b", "<<", "=", "x" * 10_000),
    *("é", "\u2028", "\x07", "two\nlines", "../../etc/passwd", "/", ".", "batch", "length", "tensor", "{0}", "%s"),
    *(0, -1, 1, 2, 3, 7, 1.5, -0.5, 1e308, 5e-324, 1 << 20, (1 << 20) + 1, 1 << 31, 1 << 63, 10**30, 10**400),
    *(float("nan"), float("inf"), float("-inf")),
    *([], {}, [[]], [None], [1, 2, 3], ["a", "a"], {"a": 1}, {"": 1}, {"name": None}, [{}], list(range(2000)), DEEP),
    *(datetime.date(2026, 2, 3), datetime.datetime(2026, 2, 3, 4, 5), b"\x00\xff"),
)
"""Any of them may stand where another value stood. JSON, which lacks the last three, gets their text."""

KEYS: tuple[Any, ...] = (
    *("", " ", "naem", "Name", "format_version ", "x" * 5000, "two\nlines", "é", "\x7f", "a.b", "<<", "=", "yes"),
    *(1, 1.5, True, None, datetime.date(2026, 2, 3)),
)
"""Keys that a mapping may get; JSON gets their text."""

SNIPPETS = (
    *(
        "!!timestamp x",
        "!!int ''",
        "!!int 1:x",
        "!!bool maybe",
        "!!float x",
        "!!binary é",
        "!!binary YWI=",
        "!!set [1]",
    ),
    *("!!set {a, b}", "!!omap [a: 1]", "!!pairs [a: 1]", "!!map x", "!!seq x", "!!null x", "!!str 5", "!!str [1]"),
    *(
        "!!python/object/apply:os.system [id]",
        "!!python/name:os.system",
        "!own {a: 1}",
        "!<tag:x,2026:y> 1",
        "*nowhere",
    ),
    *("&a [*a]", "&a {b: *a}", "{<<: &a {<<: *a}}", "{<<: 3}", "{<<: [1]}", "{<<: {a: 1}, a: 2}", "&a x", "&a"),
    *(
        "2026-13-01",
        "2026-02-30",
        "2026-01-01T99:99:99",
        "2026-02-03 04:05:06",
        "1:60:60",
        "190:20:30",
        "1_000",
        "0o17",
    ),
    *("0b2", "0x", "08", ".", "-", ":", "?", "|", ">", "'", '"', "[", "{", "}", "%", "@", "`", "#", "\t", "- 1", "? a"),
    *("9" * 5000, "-" + "9" * 5000, "1e400", "1e-400", ".nan", ".inf", "-.INF", "~", "yes", "on", "y", "1e-3", "1.e+3"),
    *(
        "[" * 3000,
        "{a: " * 400,
        "[" * 200 + "]" * 200,
        '"\\ud800"',
        '"\\x00"',
        '"\\u2028"',
        '"\\q"',
        "a\x00b",
        "a\x85b",
    ),
    *("{[a]: 1}", "{{a: 1}: 2}", "{a: 1, a: 2}", "---", "...", "--- 1\n--- 2", "%YAML 9.9\n---", "%TAG ! x\n---"),
)
"""YAML that may stand where another value stood, or on a line of its own."""

LAUGHS = "".join(f"lol{n}: &lol{n} [{', '.join([f'*lol{n - 1}'] * 9)}]\n" for n in range(1, 30))
QUADRATIC = f"lol0: &lol0 {'x' * 20_000}\nlol1: [{', '.join(['*lol0'] * 10_000)}]\n"
MERGES = "m0: &m0 {a: 1}\n" + "".join(f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}\n" for n in range(1, 30))
BOMBS = (f"lol0: &lol0 [x, x]\n{LAUGHS}", QUADRATIC, MERGES)
"""Small texts that mean huge documents."""


def damage_bytes(chance: random.Random, content: bytes) -> bytes:
    """Flip, delete, insert, duplicate or truncate, up to four times."""
    damaged = bytearray(content)
    for _ in range(chance.randint(1, 4)):
        begin = chance.randrange(len(damaged) + 1)
        end = min(len(damaged), begin + chance.choice((1, 1, 1, 4, 30, 200)))
        how = chance.randrange(6)
        if how == 0 and begin < len(damaged):
            damaged[begin] ^= 1 << chance.randrange(8)
        elif how == 1:
            del damaged[begin:end]
        elif how == 2:
            damaged[begin:begin] = chance.randbytes(chance.choice((1, 2, 8)))
        elif how == 3:
            damaged[begin:begin] = damaged[begin:end] * chance.choice((1, 1, 50))
        elif how == 4:
            damaged[begin:begin] = chance.choice((b"\x00", b"\xff", b"\r", b"\t", b"\n", b":", b"-", b'"', b"'", b"{"))
        elif chance.random() < 0.3:
            del damaged[begin:]
    return bytes(damaged)


def encode(chance: random.Random, content: bytes) -> bytes:
    """The same text, or one with an accent, in another encoding."""
    text = content.decode()
    accented = text.replace("e", "é", 1)
    line = chance.randrange(text.count("\n") + 1)
    return chance.choice(
        (
            *(text.encode(name) for name in ("utf-16", "utf-16-le", "utf-32", "utf-8-sig", "utf-7", "cp037")),
            *(accented.encode(name) for name in ("latin-1", "utf-8", "cp1252", "mac-roman", "utf-16")),
            text.replace("\n", "\r\n").encode(),
            text.replace("\n", "\r").encode(),
            text.replace(" ", "\u00a0").encode(),
            text.replace("  ", "\t").encode(),
            "\n".join(part + "\x00" * (i == line) for i, part in enumerate(text.split("\n"))).encode(),
            *(
                b"",
                b"\n",
                b" ",
                b"# nothing\n",
                b"null\n",
                b"[]\n",
                b"{}\n",
                b"---\n",
                b"5\n",
                b"\xef\xbb\xbf",
                b"\x00",
            ),
        )
    )


def insert_yaml(chance: random.Random, content: bytes) -> bytes:
    """A snippet instead of the rest of a line, or on a line of its own; now and then a bomb."""
    lines = content.decode().splitlines()
    for _ in range(chance.randint(1, 2)):
        number = chance.randrange(len(lines))
        indent = lines[number][: len(lines[number]) - len(lines[number].lstrip())]
        key, colon, _ = lines[number].partition(":")
        snippet = chance.choice(SNIPPETS)
        if colon and chance.random() < 0.7:
            lines[number] = f"{key}: {snippet}"
        else:
            lines.insert(number, indent + chance.choice((snippet, f"added: {snippet}")))
    text = "\n".join(lines) + "\n"
    if chance.random() < 0.04:
        text = chance.choice((chance.choice(BOMBS) + text, text + chance.choice(BOMBS)))
    return text.encode("utf-8", "surrogatepass")


def change_structure(chance: random.Random, content: bytes) -> bytes:
    """Drop, add, rename, swap, nest or replace up to three values of the document, and write it again."""
    is_json = content.lstrip().startswith(b"{")
    root = [copy.deepcopy(yaml.safe_load(content))]
    for _ in range(chance.randint(1, 3)):
        holder, key = chance.choice(_places(root))
        _change(chance, holder, key)
    return write(root[0], as_json=is_json)


def write(document: Any, *, as_json: bool) -> bytes:
    """A document as a file's bytes."""
    if as_json:
        return json.dumps(_with_text_keys(document), default=str).encode()
    return yaml.safe_dump(document, sort_keys=False, allow_unicode=True).encode("utf-8", "surrogatepass")


def _with_text_keys(value: Any) -> Any:
    if isinstance(value, dict):
        return {key if isinstance(key, str) else str(key): _with_text_keys(item) for key, item in value.items()}
    return [_with_text_keys(item) for item in value] if isinstance(value, list) and value is not DEEP else value


def _places(holder: Any) -> list[tuple[Any, Any]]:
    """Every value of a document, as what holds it and its key there."""
    found = []
    pairs = list(holder.items()) if isinstance(holder, dict) else list(enumerate(holder))
    for key, value in pairs:
        found.append((holder, key))
        if isinstance(value, dict | list) and value is not DEEP and len(value) < 100:
            found.extend(_places(value))
    return found


def _change(chance: random.Random, holder: Any, key: Any) -> None:
    value, other = holder[key], copy.deepcopy(chance.choice(VALUES))
    how = chance.randrange(8)
    if how == 0 and isinstance(holder, dict):
        del holder[key]
    elif how == 1 and isinstance(holder, dict):
        holder[chance.choice(KEYS)] = holder.pop(key)
    elif how == 2 and isinstance(value, dict):
        value[chance.choice(KEYS)] = other
    elif how == 2 and isinstance(value, list):
        value.insert(chance.randrange(len(value) + 1), other)
    elif how == 3 and isinstance(value, list) and value:
        chance.choice((value.pop, value.reverse, lambda: value.append(copy.deepcopy(value[-1]))))()
    elif how == 4:
        holder[key] = chance.choice(([value], {"value": value}, str(value), [value, value]))
    elif how == 5 and isinstance(value, int | float):
        holder[key] = chance.choice(
            (
                -value,
                value + 1,
                value - 1,
                value * 1000,
                value / 3 if abs(value) < 1e300 else 0,
                bool(value),
                str(value),
            )
        )
    else:
        holder[key] = other


MUTATIONS: dict[str, Callable[[random.Random, bytes], bytes]] = {
    "bytes": damage_bytes,
    "encoding": encode,
    "yaml": insert_yaml,
    "structure": change_structure,
}
