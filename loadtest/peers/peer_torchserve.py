"""Stock TorchServe: its own archiver, a plain handler, batches of 32 with a delay of 10 ms.

This one runs in torchport's own environment, which has TorchServe. `--quiet` gives it torchport's log configuration, as
a kindness: its own writes several lines a request.
"""

import os
import subprocess
import sys
import tempfile
from pathlib import Path

from deploy.configuration import LOG_CONFIG
from deploy.java import find_java
from deploy.ports import Ports
from loadtest.peers.settings import HOST, MAX_BATCH, PeerSettings

NAME = "peer"
MAX_BATCH_DELAY_MS = 10
HANDLER = Path(__file__).with_name("torchserve_handler.py")
QUIET = "--quiet"


def build_archive(store: Path, *, workers: int) -> None:
    """Packs the handler with TorchServe's own archiver; the model itself is read from the extracted archive."""
    config = store / "model-config.yaml"
    config.write_text(
        f"minWorkers: {workers}\nmaxWorkers: {workers}\nbatchSize: {MAX_BATCH}\nmaxBatchDelay: {MAX_BATCH_DELAY_MS}\n",
        encoding="utf-8",
    )
    command = ["--model-name", NAME, "--version", "1", "--handler", str(HANDLER), "--config-file", str(config)]
    subprocess.run(
        [sys.executable, "-m", "model_archiver.model_packaging", *command, "--export-path", str(store)], check=True
    )


def properties(ports: Ports, port: int) -> str:
    """Where to listen; everything else is TorchServe's default."""
    return (
        f"inference_address=http://{HOST}:{port}\n"
        f"management_address=http://{HOST}:{ports.management}\n"
        f"metrics_address=http://{HOST}:{ports.metrics}\n"
        f"grpc_inference_port={ports.grpc_inference}\n"
        f"grpc_management_port={ports.grpc_management}\n"
        # It would ask for GPU packages that it does not install.
        "disable_system_metrics=true\n"
        "default_workers_per_model=1\n"
    )


def serve(settings: PeerSettings, *, quiet: bool) -> None:
    """Becomes TorchServe."""
    work = Path(tempfile.mkdtemp(prefix="ts-"))
    build_archive(work, workers=settings.workers)
    config = work / "config.properties"
    config.write_text(properties(Ports.free(), settings.port), encoding="utf-8")
    os.environ["JAVA_HOME"] = str(find_java().home)
    command = [sys.executable, "-m", "ts.model_server", "--start", "--foreground", "--ncs", "--disable-token-auth"]
    command += ["--ts-config", str(config), "--model-store", str(work), "--models", f"{NAME}={NAME}.mar"]
    if quiet:
        command += ["--log-config", str(LOG_CONFIG)]
    os.chdir(work)
    os.execv(sys.executable, command)


if __name__ == "__main__":
    QUIET_LOG = QUIET in sys.argv
    ARGUMENTS = [word for word in sys.argv[1:] if word != QUIET]
    serve(PeerSettings.from_arguments(ARGUMENTS), quiet=QUIET_LOG)
