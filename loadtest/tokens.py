"""Finding the token of a server on this machine."""

import ipaddress
from urllib.parse import urlsplit


def find_token(url: str, token: str | None) -> str | None:
    """The bearer token for a server.

    Args:
        url: Where the server answers predictions.
        token: What the user gave; it is taken as it is.

    Returns:
        The token, or None where none is known. That is no error: a server that torchport did not start may need
        none, and one that does says so in its answer.

    Raises:
        StateError: torchport started the server, but its tokens cannot be read or renewed.
    """
    parts = urlsplit(url)
    if token is not None or not _is_loopback(parts.hostname or ""):
        return token
    # Imported here: only a server on this machine has its coordinates on this machine.
    from deploy.errors import StateError  # noqa: PLC0415
    from deploy.state import find_server  # noqa: PLC0415

    try:
        server = find_server(parts.port or 80)
    except StateError:
        return None
    return server.inference_token()


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:  # a name, not an address
        return host == "localhost"
