"""The configuration of TorchServe: the project's ``config.properties``, with addresses and paths filled in."""

from __future__ import annotations

import json
import os
import sysconfig
from collections.abc import Mapping
from pathlib import Path

from deploy.errors import StartError
from deploy.gpu import collector_command
from deploy.placement import VISIBLE_DEVICES, runs_on_gpu, usable_gpus
from deploy.ports import Ports

CONFIG_FILE = "config.properties"
_PACKAGE = Path(__file__).parent
LOG_CONFIG = _PACKAGE / "log4j2.xml"
METRICS_CONFIG = _PACKAGE / "metrics.yaml"

# Seconds. As often as Prometheus usually asks; TorchServe's own minute shows little of a GPU's load.
_METRICS_INTERVAL_S = 15


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


def server_properties(
    ports: Ports, *, host: str, model_store: Path, models: Mapping[str, Path], scalable: bool, gpus: int | None = None
) -> str:
    """The properties of one server.

    Args:
        ports: Where it listens.
        host: Address for predictions; management, metrics and gRPC stay on the loopback.
        model_store: Folder of the archives.
        models: Archive file by model name.
        scalable: Whether the management API may change the number of workers.
        gpus: For workers; None if no model runs on one. See :func:`count_gpus`.

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
        **_gpu_properties(gpus),
    }
    merged = {**read_properties(find_properties()), **overrides}
    return "".join(f"{key}={_escape(value)}\n" for key, value in merged.items())


def count_gpus(models: Mapping[str, Path]) -> int | None:
    """How many GPUs there are for the workers of some models.

    Args:
        models: Archive file by model name.

    Returns:
        None if no model runs on one.

    Raises:
        StartError: If a model needs a GPU, and they are named in a way that TorchServe cannot read, or their driver
            does not answer.
    """
    if not any(runs_on_gpu(path) for path in models.values()):
        return None
    try:
        return usable_gpus(os.environ)
    except ValueError as error:
        raise StartError(
            f"{error}, and TorchServe 0.12 reads only numbers there; name the GPUs by their numbers, such as "
            f"{VISIBLE_DEVICES}=0,1, or unset it"
        ) from error
    except TimeoutError as error:
        raise StartError(
            f"{error}, and a model needs a GPU; try nvidia-smi, and where it is silent too, restart the machine"
        ) from error


def _gpu_properties(gpus: int | None) -> dict[str, str]:
    """How many GPUs TorchServe hands out to workers, and what reads their metrics; see :func:`count_gpus`."""
    if gpus is None:
        # TorchServe would give every worker one that it makes no use of, and ask nvidia-smi about each at every look.
        return {"number_of_gpu": "0"}
    if not gpus:
        return {}  # a worker says better what is missing
    return {
        "number_of_gpu": str(gpus),
        "disable_system_metrics": "false",
        "system_metrics_cmd": collector_command(),
        "metric_time_interval": str(_METRICS_INTERVAL_S),
    }


def _escape(value: str) -> str:
    """A value as Java reads it: in a properties file the backslash escapes, and all beyond ASCII has to be escaped."""
    return json.dumps(value)[1:-1]  # the escapes of JSON are understood in a properties file too
