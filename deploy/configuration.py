"""The configuration of TorchServe: the project's ``config.properties``, with addresses and paths filled in."""

from __future__ import annotations

import json
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from deploy.errors import StartError
from deploy.ports import Ports

CONFIG_FILE = "config.properties"
_PACKAGE = Path(__file__).parent
LOG_CONFIG = _PACKAGE / "log4j2.xml"
METRICS_CONFIG = _PACKAGE / "metrics.yaml"


def find_properties() -> Path:
    """The production configuration: in a checkout beside the packages, after an install in the data folder.

    Raises:
        StartError: If neither place has it.
    """
    places = [_PACKAGE.parent / CONFIG_FILE, Path(sysconfig.get_path("data")) / "share" / "torchport" / CONFIG_FILE]
    for place in places:
        if place.is_file():
            return place
    raise StartError(f"{CONFIG_FILE} is not in {places[0].parent} or {places[1].parent}; install torchport again")


def read_properties(path: Path) -> dict[str, str]:
    """Read a properties file of plain ``key=value`` lines."""
    lines = (line.strip() for line in path.read_text(encoding="utf-8").splitlines())
    pairs = (line.partition("=") for line in lines if line and not line.startswith("#"))
    return {key.strip(): value.strip() for key, _, value in pairs}


def server_properties(ports: Ports, *, host: str, model_store: Path, models: Mapping[str, Path], scalable: bool) -> str:
    """The properties of one server.

    Args:
        ports: Where it listens.
        host: Address for predictions; management, metrics and gRPC stay on the loopback.
        model_store: Folder of the archives.
        models: Archive file by model name.
        scalable: Whether the management API may change the number of workers.

    Returns:
        The text of a properties file.
    """
    overrides = {
        "inference_address": f"http://{host}:{ports.inference}",
        "management_address": f"http://127.0.0.1:{ports.management}",
        "metrics_address": f"http://127.0.0.1:{ports.metrics}",
        "grpc_inference_port": str(ports.grpc_inference),
        "grpc_management_port": str(ports.grpc_management),
        "model_store": str(model_store),
        "load_models": ",".join(f"{name}={path.name}" for name, path in models.items()),
        "metrics_config": str(METRICS_CONFIG),
        "enable_model_api": str(scalable).lower(),
    }
    merged = {**read_properties(find_properties()), **overrides}
    return "".join(f"{key}={_escape(value)}\n" for key, value in merged.items())


def _escape(value: str) -> str:
    """A value as Java reads it: in a properties file the backslash escapes, and all beyond ASCII has to be escaped."""
    return json.dumps(value)[1:-1]  # the escapes of JSON are understood in a properties file too
