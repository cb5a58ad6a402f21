"""Stock TorchServe with its own handler, for gpu_serving.py: nothing of torchport between the client and the model."""

import contextlib
import os
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import httpx

from deploy.configuration import LOG_CONFIG
from deploy.java import find_java
from deploy.ports import LOOPBACK, Ports
from loadtest.compare_server import MARK, end_family

HANDLER = Path(__file__).with_name("gpu_stock_handler.py")
MAX_BATCH, MAX_BATCH_DELAY_MS = 32, 10
READY_TIMEOUT_S = 120.0
_POLL_S = 0.2


class StockServer:
    """A running one.

    Attributes:
        address: Host and port of predictions.
    """

    def __init__(self, ports: Ports, process: subprocess.Popen[bytes], log: Path, models: tuple[str, ...]) -> None:
        self.address = (LOOPBACK, ports.inference)
        self._management = f"http://{LOOPBACK}:{ports.management}"
        self._process = process
        self._log = log
        self._models = models

    def wait_until_ready(self) -> None:
        """Wait for every model's worker.

        Raises:
            RuntimeError: If it ends, or a worker is not there in time.
        """
        deadline = time.monotonic() + READY_TIMEOUT_S
        while time.monotonic() < deadline and self._process.poll() is None:
            if all(self._is_ready(model) for model in self._models):
                return
            time.sleep(_POLL_S)
        lines = self._log.read_text(encoding="utf-8", errors="replace").splitlines()
        raise RuntimeError(f"stock TorchServe was not ready: {' | '.join(lines[-5:])}")

    def _is_ready(self, model: str) -> bool:
        with contextlib.suppress(httpx.TransportError):
            answer = httpx.get(f"{self._management}/models/{model}", timeout=10, trust_env=False)
            if answer.status_code == httpx.codes.OK:
                workers = answer.json()[0]["workers"]
                return bool(workers) and all(worker["status"] == "READY" for worker in workers)
        return False


@contextlib.contextmanager
def stock_serving(modules: Mapping[str, Path], *, device: str) -> Iterator[StockServer]:
    """TorchServe with some TorchScript files, one worker each, which is not waited for; leaving the block ends it.

    Args:
        modules: Files by model name.
        device: ``cuda`` or ``cpu``.
    """
    work = Path(tempfile.mkdtemp(prefix="ts-"))
    ports = Ports.free()
    mark = secrets.token_hex(16)
    try:
        for name, module in modules.items():
            _pack(name, module, work, device=device)
        (work / "config.properties").write_text(
            f"inference_address=http://{LOOPBACK}:{ports.inference}\n"
            f"management_address=http://{LOOPBACK}:{ports.management}\n"
            f"metrics_address=http://{LOOPBACK}:{ports.metrics}\n"
            f"grpc_inference_port={ports.grpc_inference}\n"
            f"grpc_management_port={ports.grpc_management}\n"
            # It would ask for GPU packages that it does not install.
            "disable_system_metrics=true\n"
            "default_workers_per_model=1\n"
            # By default it refuses more than a hundred that wait.
            "job_queue_size=2000\n",
            encoding="utf-8",
        )
        command = [sys.executable, "-m", "ts.model_server", "--start", "--foreground", "--ncs", "--disable-token-auth"]
        command += ["--ts-config", str(work / "config.properties"), "--model-store", str(work)]
        # Its own log has several lines a request: this one is a kindness.
        command += ["--log-config", str(LOG_CONFIG), "--models", *(f"{name}={name}.mar" for name in modules)]
        log = work / "server.log"
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("TS_", "TORCHPORT_"))}
        with log.open("wb") as output:
            process = subprocess.Popen(
                command,
                cwd=work,
                env={**inherited, MARK: mark, "JAVA_HOME": str(find_java().home), "TMPDIR": str(work)},
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            yield StockServer(ports, process, log, tuple(modules))
        finally:
            end_family(process, mark)
    finally:
        shutil.rmtree(work, ignore_errors=True)


def _pack(name: str, module: Path, store: Path, *, device: str) -> None:
    """An archive as TorchServe's own archiver makes it."""
    config = store / f"{name}.yaml"
    config.write_text(
        f"minWorkers: 1\nmaxWorkers: 1\nbatchSize: {MAX_BATCH}\nmaxBatchDelay: {MAX_BATCH_DELAY_MS}\n"
        f"deviceType: {'gpu' if device == 'cuda' else 'cpu'}\n",
        encoding="utf-8",
    )
    words = ["--model-name", name, "--version", "1", "--serialized-file", str(module), "--handler", str(HANDLER)]
    words += ["--config-file", str(config), "--export-path", str(store)]
    subprocess.run([sys.executable, "-m", "model_archiver.model_packaging", *words], check=True, capture_output=True)
