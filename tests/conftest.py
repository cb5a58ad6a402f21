"""What all tests share."""

import os
import signal

# As the command line does, and before anything imports torch: see `torchport.main`.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_configure() -> None:
    """Started in the background of a script, tests inherit an ignored SIGINT, and so would every server they start."""
    if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)
