"""What can go wrong with the systems that `torchport compare` measures.

LoadTestError
├── PeersError         the peers' environment cannot be made
└── SystemStartError   one system does not start, or does not answer
"""

from loadtest.errors import LoadTestError


class PeersError(LoadTestError):
    """The virtual environment of the peers cannot be made."""


class SystemStartError(LoadTestError):
    """A system does not start, or does not answer rightly."""
