"""Parameters of one request: what its answer should look like.

They stand beside the inputs of a JSON body, in a field ``parameters`` of a multipart one, in the header
``X-Parameters`` of a raw one, all as a JSON object; or in the URL's query, on the routes where TorchServe passes it on.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from handlers.errors import MalformedError, OutOfRangeError
from handlers.words import kind, shown_keys

PARAMETERS_FIELD = "parameters"
PARAMETERS_HEADER = "x-parameters"


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameters:
    """The parameters of one request.

    Attributes:
        top_k: How many classes an answer lists; None for the usual number.
    """

    top_k: int | None = None


NO_PARAMETERS = Parameters()


def read_parameters(value: object, *, classes: int) -> Parameters:
    """Read and check the parameters of one request.

    Args:
        value: What JSON parsing gave; None if the request has none.
        classes: How many the model has; 0 if it has none.

    Raises:
        RequestError: If they are no object, or one is unknown or out of its range.
    """
    if value is None:
        return NO_PARAMETERS
    if not isinstance(value, dict):
        raise MalformedError(
            "wrong_parameters", f"The parameters must be an object of names and values, not {kind(value)}."
        )
    known = ("top_k",) if classes else ()
    unknown = [name for name in value if name not in known]
    if unknown:
        takes = f"this model takes {', '.join(known)}" if known else "this model takes none"
        raise OutOfRangeError("unknown_parameter", f"Unknown parameters: {shown_keys(unknown)}; {takes}.")
    top_k = value.get("top_k")
    if top_k is not None and (type(top_k) is not int or not 1 <= top_k <= classes):
        raise OutOfRangeError("wrong_parameter", f"top_k must be a whole number from 1 to {classes}.")
    return Parameters(top_k=top_k)


def query_parameters(query: Mapping[str, object]) -> dict[str, object] | None:
    """The parameters in a URL's query, as JSON would have given them.

    Args:
        query: Values by name, as TorchServe gives them: bytes, undeclared. Names that are no parameters are left out,
            for clients put tokens and such there.

    Returns:
        None if there are none.
    """
    text = query.get("top_k")
    if isinstance(text, bytes | bytearray):
        text = bytes(text).decode("utf-8", errors="replace")
    if text is None:
        return None
    return {"top_k": int(text) if isinstance(text, str) and text.isdecimal() and len(text) < 20 else text}
