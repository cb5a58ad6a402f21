"""Reading of JSON-like documents field by field, with errors that name the field, the value and the remedy.

Pydantic would be the usual choice; but this code runs inside archives, in environments that hold only torch,
torchserve and an inference runtime.
"""

from __future__ import annotations

import difflib
import math
import reprlib
from collections.abc import Mapping, Sequence

from handlers.errors import SignatureError

# The whole of a value may be far larger than what is shown of it, above all where lists share their items.
_REPR = reprlib.Repr()
_REPR.maxlevel = 4
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 200  # of which it keeps both ends
_REPR.maxdict = _REPR.maxlist = _REPR.maxtuple = _REPR.maxset = _REPR.maxfrozenset = 20


def shown(value: object) -> str:
    """A value for a message: short, on one line, whatever it is."""
    try:
        text = _REPR.repr(value).replace("\n", " ")  # a tensor's has lines
    except (ValueError, RecursionError):  # an integer of more than 4,300 digits; lists nested beyond the stack
        text = f"a {type(value).__name__} too large to show"
    return text if len(text) <= 60 else text[:57] + "..."


def is_word(name: str) -> bool:
    """Whether a name of a tensor or an axis is one that messages and code can use as it stands."""
    return name.isidentifier() and len(name) <= 80


class Section:
    """One mapping of a document, read field by field.

    Args:
        value: The mapping as parsed from JSON or YAML.
        where: Dotted path of this mapping within its document, for messages.

    Raises:
        SignatureError: If ``value`` is not a mapping with string keys.
    """

    def __init__(self, value: object, where: str) -> None:
        if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
            raise SignatureError(f"{where} must be a mapping of names to values, not {shown(value)}")
        self._fields: Mapping[str, object] = value
        self._where = where
        self._known: list[str] = []

    def _path(self, key: str) -> str:
        # Keys of a stranger's document may be long or unprintable; those that are names read better without quotes.
        return f"{self._where}.{key if is_word(key) else shown(key)}"

    def _take(self, key: str) -> object:
        self._known.append(key)
        if key not in self._fields:
            raise SignatureError(f"{self._path(key)} is missing")
        return self._fields[key]

    def names(self) -> list[str]:
        """The names of all fields, for mappings whose keys are data."""
        return list(self._fields)

    def has(self, key: str) -> bool:
        """Whether an optional field is present and not null."""
        self._known.append(key)
        return self._fields.get(key) is not None

    def string(self, key: str, *, choices: Sequence[str] | None = None) -> str:
        """A non-empty string, one of ``choices`` when given."""
        value = self._take(key)
        if not isinstance(value, str) or not value:
            raise SignatureError(f"{self._path(key)} must be a non-empty string, not {shown(value)}")
        if choices is not None and value not in choices:
            raise SignatureError(f"{self._path(key)} is {shown(value)}; choose one of: {', '.join(choices)}")
        return value

    def integer(self, key: str, *, minimum: int, maximum: int) -> int:
        """A whole number between two bounds, both included."""
        value = self._take(key)
        if isinstance(value, bool) or not isinstance(value, int) or not minimum <= value <= maximum:
            raise SignatureError(
                f"{self._path(key)} must be a whole number from {minimum} to {maximum}, not {shown(value)}"
            )
        return value

    def number(self, key: str) -> float:
        """A finite number."""
        return self._finite(self._take(key), self._path(key))

    def numbers(
        self, key: str, *, length: int | None = None, minimum: float = -math.inf, maximum: float = math.inf
    ) -> tuple[float, ...]:
        """A list of finite numbers within bounds, of exactly ``length`` items when given."""
        values = self.sequence(key)
        if length is not None and len(values) != length:
            raise SignatureError(f"{self._path(key)} must have {length} items, not {len(values)}")
        numbers = tuple(self._finite(value, f"{self._path(key)}[{i}]") for i, value in enumerate(values))
        for i, number in enumerate(numbers):
            if not minimum <= number <= maximum:
                raise SignatureError(f"{self._path(key)}[{i}] must lie from {minimum:g} to {maximum:g}, not {number:g}")
        return numbers

    def strings(self, key: str) -> tuple[str, ...]:
        """A list of non-empty, distinct strings."""
        values = self.sequence(key)
        for i, value in enumerate(values):
            if not isinstance(value, str) or not value:
                raise SignatureError(f"{self._path(key)}[{i}] must be a non-empty string, not {shown(value)}")
            if value in values[:i]:
                raise SignatureError(f"{self._path(key)} lists {shown(value)} twice")
        return tuple(str(value) for value in values)

    def sequence(self, key: str) -> list[object]:
        """A list of anything."""
        value = self._take(key)
        if not isinstance(value, list | tuple):
            raise SignatureError(f"{self._path(key)} must be a list, not {shown(value)}")
        return list(value)

    def section(self, key: str) -> Section:
        """A nested mapping."""
        return Section(self._take(key), self._path(key))

    def mapping(self, key: str) -> dict[str, object]:
        """A mapping of names to anything, not read any further."""
        section = self.section(key)
        return dict(section._fields)

    def sections(self, key: str) -> list[Section]:
        """A list of nested mappings."""
        return [Section(item, f"{self._path(key)}[{i}]") for i, item in enumerate(self.sequence(key))]

    def finish(self) -> None:
        """Refuse fields that nobody has asked for: a misspelt optional field must not be lost silently."""
        unknown = sorted(set(self._fields) - set(self._known))
        if unknown:
            near = difflib.get_close_matches(unknown[0], self._known, n=1)
            hint = (
                f"did you mean {near[0]!r}?"
                if near
                else f"the fields here are: {', '.join(dict.fromkeys(self._known))}"
            )
            raise SignatureError(f"{self._path(unknown[0])} is not a known field; {hint}")

    @staticmethod
    def _finite(value: object, path: str) -> float:
        # A huge JSON integer is an int that no float can hold: isfinite raises OverflowError for it.
        try:
            if not isinstance(value, bool) and isinstance(value, int | float) and math.isfinite(value):
                return float(value)
        except OverflowError:
            pass
        raise SignatureError(f"{path} must be a finite number, not {shown(value)}")
